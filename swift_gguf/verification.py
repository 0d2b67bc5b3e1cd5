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


def verify(tree: Tree, *, choose: Callable[[int], int], is_eog: Callable[[int], bool]) -> Verdict:
    """Follows the target's choices down the tree.

    choose: the target's next token after a node (ROOT: after the pending token).  It is called once
        a node, in order, and for no node that is not on the path: samplers have state.
    is_eog: after an end of generation nothing more is chosen.
    """
    tokens: list[int] = []
    accepted: list[int] = []
    node = ROOT
    while True:
        token = choose(node)
        tokens.append(token)
        child = tree.child(node, token)
        if child is not None:
            accepted.append(child)
        if child is None or is_eog(token):
            return Verdict(tokens, accepted)
        node = child
