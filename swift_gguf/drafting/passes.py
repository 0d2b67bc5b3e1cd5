"""Offers by passes over the tree: of the target without some sub-layers, or of another model."""

from __future__ import annotations

from swift_gguf.drafting.tree import ROOT, Offer, Tree
from swift_gguf.errors import (
    ContextFullError,
    DecodeError,
    NotFiniteError,
    SpoiledError,
    StoppedError,
)
from swift_gguf.model import Model
from swift_gguf.subnetwork import SubNetwork


class Passes:
    """Runs a model on nodes of a growing tree, on top of what its context holds.

    Between `begin` and `end` the model is this object's; `end` leaves its context as it was.

    subnetwork: what the passes run; may be set between drafts.
    """

    def __init__(self, name: str, model: Model, subnetwork: SubNetwork | None = None) -> None:
        self.name = name
        self.model = model
        self.subnetwork = subnetwork
        self.is_broken = False
        """Its weights are damaged: it is of no use."""
        self._pending = 0
        self._n_past = 0
        self._decoded: dict[int, int] | None = None  # tree node -> its number in the context

    def begin(self, pending: int) -> None:
        """The root of the tree stands for `pending`, which the context does not hold yet."""
        self._pending, self._n_past = pending, self.model.n_past
        self._decoded = {}

    def end(self) -> None:
        """The tree is complete, or given up."""
        if self._decoded is not None:
            self.model.rollback(self._n_past)
        self._decoded = None

    def lag(self) -> int:
        """Tokens that `begin` would have to decode."""
        return 0

    def missing(self, tree: Tree, node: int) -> int:
        """How many tokens a pass for the offers after `node` has to decode."""
        return len(self._path(tree, node))

    def run(self, tree: Tree, node: int) -> int | None:
        """A pass over `node` and what of its path is not decoded yet; the node's row of logits.

        None where a draft cannot go on; the target may.
        """
        if self._decoded is None:
            return None
        path = self._path(tree, node)
        parents = [self._decoded.get(self._parent(tree, path[0]), -1)]
        parents += range(len(self._decoded), len(self._decoded) + len(path) - 1)
        tokens = [self._pending if each == ROOT else tree.tokens[each] for each in path]
        try:
            self.model.decode_tree(tokens, parents, subnetwork=self.subnetwork)
        except StoppedError:
            raise
        except (DecodeError, ContextFullError):
            self._decoded = None  # the model took all of the tree back
            return None
        for each in path:
            self._decoded[each] = len(self._decoded)
        return len(path) - 1

    def offers(self, tree: Tree, node: int, k: int) -> list[Offer]:
        """The k likeliest tokens after `node`, likeliest first; none where a draft cannot go on."""
        row = self.run(tree, node)
        if row is None:
            return []
        try:
            tokens, probabilities = self.model.top(row, k)
        except SpoiledError:
            self.is_broken = True
            raise
        except NotFiniteError:  # of a model of its own
            self.is_broken = True
            return []
        likely = zip(tokens, probabilities, strict=True)
        return [Offer(t, p, self.name, rank) for rank, (t, p) in enumerate(likely)]

    def _path(self, tree: Tree, node: int) -> list[int]:
        """Down to `node`, what is not decoded yet."""
        decoded = self._decoded or {}
        path: list[int] = []
        while node not in decoded:
            path.append(node)
            if node == ROOT:
                break
            node = tree.parents[node]
        return path[::-1]

    @staticmethod
    def _parent(tree: Tree, node: int) -> int:
        return ROOT - 1 if node == ROOT else tree.parents[node]
