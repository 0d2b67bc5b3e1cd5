"""Self-speculative decoding for llama.cpp: the same text, faster, from the model alone."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("swift-gguf")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
