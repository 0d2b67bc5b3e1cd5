"""Which draft tokens the target agrees with: pure functions.

The rule keeps any sampler exact.  Let s_0 be the token the user's own sampler draws from the
target's distribution after the pending token, s_1 after s_0, and so on.  Go on while s_i is a
drafted child:

    x_0 = root,   x_{i+1} = the child of x_i that is s_i,   bonus = the first s_i that is no child

Every s_i that is emitted was drawn by the sampler, in order, from the distribution plain decoding
would have shown it, so with the same seed the text is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swift_gguf.drafting.tree import ROOT, Tree


@dataclass(frozen=True)
class Verdict:
    """What comes of a tree."""

    tokens: list[int]
    """To be emitted: the accepted path, then the target's own next token (the bonus), which is
    missing where the path ends with an end of generation."""
    accepted: list[int]
    """The accepted nodes, from the root on."""

    @property
    def kept(self) -> list[int]:
        """The accepted nodes that more text comes after: all but an end of generation."""
        return self.accepted[: len(self.tokens) - 1]


class Walk:
    """Down a tree by the target's choices, one after another.

    is_eog: after an end of generation nothing more is chosen.
    """

    def __init__(self, tree: Tree, *, is_eog: Callable[[int], bool]) -> None:
        self.node = ROOT
        """Where the target chooses next; ROOT: after the pending token."""
        self.done = False
        self.verdict = Verdict([], [])
        self._tree, self._is_eog = tree, is_eog

    def take(self, token: int) -> int | None:
        """The target has chosen `token`; returns the node that is accepted with it, if there is."""
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
        a node, in order, and for no node that is not on the path: samplers have state.
    is_eog: after an end of generation nothing more is chosen.
    """
    walk = Walk(tree, is_eog=is_eog)
    while not walk.done:
        walk.take(choose(walk.node))
    return walk.verdict
