"""ROOM model."""

from swift_gguf.model.loading import ModelOptions
from swift_gguf.model.model import Model

__all__ = ["Model", "ModelOptions"]
