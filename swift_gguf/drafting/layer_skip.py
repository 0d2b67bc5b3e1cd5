"""The target drafts for itself with some of its sub-layers left out (SWIFT, ICLR 2025).

The draft pass reads the target's own KV cache for everything that is already verified, which is
worth more than anything else a draft can do; it runs in C (swift_gguf_draft).
"""

from __future__ import annotations

from swift_gguf.drafting.source import Draft
from swift_gguf.model import Model
from swift_gguf.subnetwork import SubNetwork


class LayerSkip:
    """Drafts greedily until the draft's own confidence falls under `p_min`."""

    name = "layer-skip"

    def __init__(self, model: Model, subnetwork: SubNetwork, *, p_min: float) -> None:
        self.subnetwork = subnetwork
        self.p_min = p_min
        self._model = model

    def draft(self, pending: int, *, n_max: int) -> Draft:
        """See `Drafter.draft`."""
        return Draft(*self._model.draft(self.subnetwork, pending, n_max=n_max, p_min=self.p_min))
