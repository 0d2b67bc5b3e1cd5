"""Drop-in for llama-cpp-python: a `Llama` that speculates."""

from swift_gguf.native import library

library()  # llama_cpp loads ours at its first import; the modules below import it

from swift_gguf.llama.llama import Llama  # noqa: E402

__all__ = ["Llama"]
