"""Self-speculative decoding for llama.cpp: the same text, faster, from the model alone."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swift_gguf.llama import SwiftDraftModel as SwiftDraftModel
    from swift_gguf.llama import SwiftLlama as SwiftLlama
    from swift_gguf.speculation import SpeculationOptions as SpeculationOptions

try:
    __version__ = version("swift-gguf")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

_MODULES = {
    "SwiftLlama": "swift_gguf.llama",
    "SwiftDraftModel": "swift_gguf.llama",
    "SpeculationOptions": "swift_gguf.speculation",
}


def __getattr__(name: str) -> object:
    """The names above, which load what they need (llama.cpp) when they are first asked for."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
