"""Verification: finds the draft tokens that the target accepts.

The rule works with any sampler.  Let s_0 be the token that the user's sampler draws from the
target's distribution after the pending token, s_1 the one after s_0, and so on.  Continue while s_i
is a child in the tree:

    x_0 = root,   x_{i+1} = the child of x_i that is s_i,   bonus = the first s_i without a child

The sampler draws every emitted s_i, in order, from the same distribution as in plain decoding.  So
with the same seed the text is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swift_gguf.drafting.tree import ROOT, Tree


@dataclass(frozen=True)
class Verdict:
    """The result of the verification of a tree."""

    tokens: list[int]
    """The tokens to emit: the accepted path and the target's own next token (the bonus).  There is
    no bonus if the path ends with an end-of-generation token."""
    accepted: list[int]
    """The accepted nodes, from the root on."""

    @property
    def kept(self) -> list[int]:
        """The accepted nodes without an end-of-generation token."""
        return self.accepted[: len(self.tokens) - 1]


class Walk:
    """A walk down a tree that follows the target's choices, one after another.

    is_eog: true for a token that ends the generation and the walk.
    """

    def __init__(self, tree: Tree, *, is_eog: Callable[[int], bool]) -> None:
        self.node = ROOT
        """The node after which the target chooses next; ROOT: after the pending token."""
        self.done = False
        self.verdict = Verdict([], [])
        self._tree, self._is_eog = tree, is_eog

    def take(self, token: int) -> int | None:
        """Follows the target's choice `token`.  Returns the accepted node, if there is one."""
        child = self._tree.child(self.node, token)
        self.verdict.tokens.append(token)
        if child is not None:
            self.verdict.accepted.append(child)
            self.node = child
        self.done = child is None or self._is_eog(token)
        return child


def verify(tree: Tree, *, choose: Callable[[int], int], is_eog: Callable[[int], bool]) -> Verdict:
    """Follows the target's choices down the tree.

    choose: the target's next token after a node (ROOT: after the pending token).  It is called once
        for each node on the path, in order, and for no other node, because samplers have state.
    is_eog: true for a token that ends the generation.
    """
    walk = Walk(tree, is_eog=is_eog)
    while not walk.done:
        walk.take(choose(walk.node))
    return walk.verdict
