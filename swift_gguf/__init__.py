"""Self-speculative decoding for llama.cpp: the same text, faster, from the model alone."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swift_gguf.engine import generate
    from swift_gguf.errors import SwiftError
    from swift_gguf.llama import Llama
    from swift_gguf.model import Model, ModelOptions
    from swift_gguf.sampling import Sampler, SamplingOptions
    from swift_gguf.session import Session
    from swift_gguf.speculation import Speculation

__all__ = [
    "Llama",
    "Model",
    "ModelOptions",
    "Sampler",
    "SamplingOptions",
    "Session",
    "Speculation",
    "SwiftError",
    "generate",
]

try:
    __version__ = version("swift-gguf")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

_MODULES = {
    "Llama": "llama",
    "Model": "model",
    "ModelOptions": "model",
    "Sampler": "sampling",
    "SamplingOptions": "sampling",
    "Session": "session",
    "Speculation": "speculation",
    "SwiftError": "errors",
    "generate": "engine",
}


def __getattr__(name: str) -> object:
    """The names above.  Each loads what it needs (llama.cpp, numpy) when it is first asked for."""
    if name in _MODULES:
        return getattr(import_module(f"swift_gguf.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
