"""Drop-in for llama-cpp-python: a `Llama` that speculates, and drafts for one that does not."""

from swift_gguf.llama.draft_model import SwiftDraftModel
from swift_gguf.llama.swift_llama import SwiftLlama

__all__ = ["SwiftDraftModel", "SwiftLlama"]
