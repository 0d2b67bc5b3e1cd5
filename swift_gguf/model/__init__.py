"""llama.cpp's model and context: token ids in, logits out, rollback to any earlier position."""

from swift_gguf.model.loading import ModelOptions
from swift_gguf.model.model import NARROW_MAX, Model, Sublayer

__all__ = ["NARROW_MAX", "Model", "ModelOptions", "Sublayer"]
