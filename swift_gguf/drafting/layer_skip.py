"""The target drafts for itself with some of its sub-layers left out (SWIFT, ICLR 2025).

The draft pass reads the target's own KV cache for everything that is already verified, which is
worth more than anything else a draft can do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from swift_gguf.cells import MAX_BRANCHES
from swift_gguf.drafting.policy import Threshold
from swift_gguf.drafting.tree import ROOT, Offer, Policy, Shape, Tree, grow, grow_sampled
from swift_gguf.errors import DecodeError, SamplingError, StoppedError
from swift_gguf.model import Model
from swift_gguf.subnetwork import SubNetwork

if TYPE_CHECKING:
    from swift_gguf.sampling import SpeculativeSampler
    from swift_gguf.speculative_sampling import Distribution


CHAIN = Shape(n_nodes=0)
LOST = -2


class LayerSkip:
    """Drafts the likeliest tree, or with a sampler a drawn one.

    policy: when to stop.
    shape: branching; its number of nodes is the engine's to say.
    sampler: draws the draft tokens, for speculative sampling; None: the likeliest ones.
    subnetwork, policy, sampler, resting: may be set between drafts.
    """

    name = "layer-skip"

    def __init__(
        self,
        model: Model,
        subnetwork: SubNetwork,
        *,
        policy: Policy | None = None,
        shape: Shape = CHAIN,
        sampler: SpeculativeSampler | None = None,
    ) -> None:
        self.subnetwork = subnetwork
        self.policy: Policy = policy or Threshold(0.0)
        self.shape = shape
        self.sampler = sampler
        self.resting = False
        """Drafts nothing, at no cost."""
        self._model = model
        self._observers: list[Callable[[Tree, Sequence[int]], None]] = []

    def draft(self, pending: int, *, n_max: int) -> Tree:
        """See `Drafter.draft`."""
        if self.resting:
            return Tree()
        model = self._model
        n_past = model.n_past
        is_chain = self.shape.branching(0.0) == 1
        n_nodes = n_max if is_chain else min(n_max, MAX_BRANCHES)  # each leaf is a sequence
        shape = replace(self.shape, n_nodes=n_nodes)
        decoded: dict[int, int] = {}  # tree node -> number among those decoded

        def decode(tree: Tree, node: int) -> bool:
            """False where a draft cannot go on; the target may."""
            token = pending if node == ROOT else tree.tokens[node]
            parent = -1 if node == ROOT else decoded.get(tree.parents[node], LOST)
            if parent == LOST:
                return False
            try:
                model.decode_tree([token], [parent], subnetwork=self.subnetwork)
            except StoppedError:
                raise
            except DecodeError:
                decoded.clear()  # the model took all of the tree back
                return False
            decoded[node] = len(decoded)
            return True

        def expand(tree: Tree, node: int) -> list[Offer]:
            if not decode(tree, node):
                return []
            tokens, probabilities = model.top(0, 1 if is_chain else shape.branching(0.0))
            return [Offer(*offer) for offer in zip(tokens, probabilities, strict=True)]

        def draw(
            tree: Tree, node: int, width: Callable[[float], int]
        ) -> tuple[list[Offer], Distribution | None]:
            assert self.sampler is not None
            if not decode(tree, node):
                return [], None
            try:
                q = self.sampler.proposal(model, 0, tree.path(node))
            except SamplingError:  # a path that the grammar cannot go on from
                return [], None
            children = self.sampler.draw(q, width(float(q.p.max())))
            return [Offer(token, q.of(token)) for token in children], q

        try:
            if self.sampler is None:
                return grow(expand, self.policy, shape, is_eog=model.is_eog)
            return grow_sampled(draw, self.policy, shape, is_eog=model.is_eog)
        finally:
            model.rollback(n_past)

    def watch(self, observer: Callable[[Tree, Sequence[int]], None]) -> None:
        """`observer` will hear what becomes of every draft."""
        self._observers.append(observer)

    def observe(self, tree: Tree, accepted: Sequence[int]) -> None:
        """See `Drafter.observe`."""
        for observer in self._observers:
            observer(tree, accepted)
