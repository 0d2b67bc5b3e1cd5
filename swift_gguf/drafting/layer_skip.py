"""Drafts with the target itself, without some of its sub-layers (SWIFT, ICLR 2025).

The draft pass reads the target's own KV cache for all verified tokens.  Nothing else improves its
acceptance rate as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from swift_gguf.drafting.passes import Passes
from swift_gguf.drafting.policy import Threshold
from swift_gguf.drafting.source import Cycle
from swift_gguf.drafting.tree import Offer, Policy, Shape, Tree, grow, grow_sampled
from swift_gguf.errors import SamplingError
from swift_gguf.model import Model
from swift_gguf.subnetwork import SubNetwork

if TYPE_CHECKING:
    from swift_gguf.sampling import SpeculativeSampler
    from swift_gguf.sampling.speculative import Distribution

NAME = "layer-skip"
CHAIN = Shape(n_nodes=0)


class LayerSkip:
    """Drafts a tree of the likeliest tokens, or of sampled ones.

    `subnetwork`, `policy` and `sampler` may be set between drafts.

    policy: decides when to stop.
    shape: the branching of the tree.  The engine sets the number of nodes.
    sampler: samples the draft tokens, for speculative sampling.  None: the likeliest tokens.
    """

    name = NAME
    prompt_s = 0.0
    """It uses the target's context, so it never processes the prompt."""

    def __init__(
        self,
        model: Model,
        subnetwork: SubNetwork,
        *,
        policy: Policy | None = None,
        shape: Shape = CHAIN,
        sampler: SpeculativeSampler | None = None,
    ) -> None:
        self.policy: Policy = policy or Threshold(0.0)
        self.shape = shape
        self.sampler = sampler
        self._model = model
        self._passes = Passes(NAME, model, subnetwork)
        self._observers: list[Callable[[Cycle], None]] = []

    @property
    def subnetwork(self) -> SubNetwork:
        assert self._passes.subnetwork is not None
        return self._passes.subnetwork

    @subnetwork.setter
    def subnetwork(self, subnetwork: SubNetwork) -> None:
        self._passes.subnetwork = subnetwork

    def draft(self, pending: int, *, n_max: int) -> Tree:
        """See `Drafter.draft`."""
        shape = self.shape.sized(n_max, n_branches=self._model.n_branches)
        width = shape.branching(0.0)
        self._passes.begin(pending)
        try:
            if self.sampler is not None:
                return grow_sampled(
                    self._draw, self.policy, shape, is_eog=self._model.is_eog, source=NAME
                )
            return grow(
                lambda tree, node: self._passes.offers(tree, node, width),
                self.policy,
                shape,
                is_eog=self._model.is_eog,
            )
        finally:
            self._passes.end()

    def _draw(
        self, tree: Tree, node: int, width: Callable[[float], int]
    ) -> tuple[Sequence[Offer], Distribution | None]:
        assert self.sampler is not None
        row = self._passes.run(tree, node)
        if row is None:
            return [], None
        try:
            q = self.sampler.proposal(self._model, row, tree.path(node))
        except SamplingError:  # the grammar allows nothing after this path
            return [], None
        children = self.sampler.draw(q, width(float(q.p.max())))
        return [Offer(token, q.of(token), NAME) for token in children], q

    def watch(self, observer: Callable[[Cycle], None]) -> None:
        """Calls `observer` with the result of every draft from now on."""
        self._observers.append(observer)

    def observe(self, cycle: Cycle) -> None:
        """See `Drafter.observe`."""
        for observer in self._observers:
            observer(cycle)
