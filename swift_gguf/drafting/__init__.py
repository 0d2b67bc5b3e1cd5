"""Sources of draft tokens (one in each file), trees of draft tokens, and verification."""

from swift_gguf.drafting.layer_skip import LayerSkip
from swift_gguf.drafting.source import Drafter
from swift_gguf.drafting.tree import Tree

__all__ = ["Drafter", "LayerSkip", "Tree"]
