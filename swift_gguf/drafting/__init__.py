"""Sources of draft tokens, a file a source; trees; verification."""

from swift_gguf.drafting.layer_skip import LayerSkip
from swift_gguf.drafting.source import Drafter
from swift_gguf.drafting.tree import Tree

__all__ = ["Drafter", "LayerSkip", "Tree"]
