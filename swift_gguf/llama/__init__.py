"""Drop-in for llama-cpp-python: a `Llama` that speculates, and drafts for one that does not."""

from swift_gguf.native import library

library()  # llama_cpp loads ours at its first import; the modules below import it

from swift_gguf.llama.draft_model import SwiftDraftModel  # noqa: E402
from swift_gguf.llama.swift_llama import SwiftLlama  # noqa: E402

__all__ = ["SwiftDraftModel", "SwiftLlama"]
