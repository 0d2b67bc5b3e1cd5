"""Draft passes over a tree, with a sub-network of the target or with a draft model."""

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
    """Runs a model on the nodes of a growing tree, after the text in its context.

    Between `begin` and `end`, nothing else may use the model.  `end` restores its context.

    subnetwork: the part of the model that the passes run.  It may be set between drafts.
    """

    def __init__(self, name: str, model: Model, subnetwork: SubNetwork | None = None) -> None:
        self.name = name
        self.model = model
        self.subnetwork = subnetwork
        self.is_broken = False
        """True if its weights are damaged, so that it cannot draft."""
        self._pending = 0
        self._n_past = 0
        self._decoded: dict[int, int] | None = None  # tree node -> its number in the context

    def begin(self, pending: int) -> None:
        """Begins a tree.  Its root is `pending`, which the context does not hold yet."""
        self._pending, self._n_past = pending, self.model.n_past
        self._decoded = {}

    def end(self) -> None:
        """Ends the tree and restores the context."""
        if self._decoded is not None:
            self.model.rollback(self._n_past)
        self._decoded = None

    def lag(self) -> int:
        """The number of tokens that `begin` has to decode."""
        return 0

    def missing(self, tree: Tree, node: int) -> int:
        """The number of tokens that a pass for the offers after `node` has to decode."""
        return len(self._path(tree, node))

    def run(self, tree: Tree, node: int) -> int | None:
        """Decodes `node` and the part of its path that is not decoded yet.

        Returns the node's row of logits.  None: the draft cannot continue here, but the target may.
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
            self._decoded = None  # the model has dropped the whole tree
            return None
        for each in path:
            self._decoded[each] = len(self._decoded)
        return len(path) - 1

    def offers(self, tree: Tree, node: int, k: int) -> list[Offer]:
        """The k likeliest tokens after `node`, likeliest first.

        Empty if the draft cannot continue here.
        """
        row = self.run(tree, node)
        if row is None:
            return []
        try:
            tokens, probabilities = self.model.top(row, k)
        except SpoiledError:
            self.is_broken = True
            raise
        except NotFiniteError:  # a draft model, which does not spoil the target's cache
            self.is_broken = True
            return []
        likely = zip(tokens, probabilities, strict=True)
        return [Offer(t, p, self.name, rank) for rank, (t, p) in enumerate(likely)]

    def _path(self, tree: Tree, node: int) -> list[int]:
        """The nodes on the path to `node` that are not decoded yet."""
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
