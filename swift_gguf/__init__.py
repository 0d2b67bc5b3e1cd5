"""Self-speculative decoding for llama.cpp: the same text, faster, from the model alone."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("swift-gguf")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> object:
    """`SwiftLlama` and `SwiftDraftModel`, which load llama.cpp when they are first asked for."""
    if name in ("SwiftLlama", "SwiftDraftModel"):
        from swift_gguf import llama

        return getattr(llama, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
