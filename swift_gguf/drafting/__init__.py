"""Sources of draft tokens, one file a source."""

from swift_gguf.drafting.layer_skip import LayerSkip
from swift_gguf.drafting.source import Draft, Drafter

__all__ = ["Draft", "Drafter", "LayerSkip"]
