"""Trees of draft tokens and their growth.  A chain is a tree whose nodes have one child."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count
from operator import mul
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from swift_gguf.sampling.speculative import Distribution

ROOT = -1
"""The parent of the first draft tokens: the pending token, sampled but not decoded yet."""


@dataclass(frozen=True)
class Tree:
    """Draft tokens.  Node i is `tokens[i]` after the path to `parents[i]`, which is ROOT or < i."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    """The drafter's own probability of each token, given its path."""
    sources: list[str] = field(default_factory=list)
    """The source of each token."""
    joints: list[float] = field(default_factory=list)
    """The joint probability of the path to each token, as computed by the policy."""
    proposals: Mapping[int, Distribution] = field(default_factory=dict)
    """Sampled drafts only: the distribution that the children of a node were sampled from."""
    ranks: list[int] = field(default_factory=list)
    """The rank of each node's offer; empty: all 0."""

    @classmethod
    def chain(cls, tokens: Sequence[int], probabilities: Sequence[float] | None = None) -> Tree:
        """A tree in which each token follows the one before."""
        known = list(probabilities) if probabilities is not None else [1.0] * len(tokens)
        joints = list(accumulate(known, mul))
        n = len(tokens)
        parents = list(range(-1, n - 1))
        return cls(list(tokens), parents, known, [""] * n, joints, ranks=[0] * n)

    def add(self, parent: int, offer: Offer, joint: float) -> int:
        """Adds a node and returns its number."""
        self.tokens.append(offer.token)
        self.parents.append(parent)
        self.probabilities.append(offer.probability)
        self.sources.append(offer.source)
        self.joints.append(joint)
        self.ranks.append(offer.rank)
        return len(self) - 1

    def offer(self, node: int) -> Offer:
        """The offer that a node was made from."""
        rank = self.ranks[node] if self.ranks else 0
        return Offer(self.tokens[node], self.probabilities[node], self.sources[node], rank)

    def cut(self, n: int) -> Tree:
        """The tree of the first n nodes.  Parents always come before their children."""
        return Tree(
            self.tokens[:n],
            self.parents[:n],
            self.probabilities[:n],
            self.sources[:n],
            self.joints[:n],
            self.proposals,
            self.ranks[:n],
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def children(self, node: int) -> list[int]:
        """Nodes whose parent is `node`, in the order they were drafted."""
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` with this token, if there is one."""
        return next((child for child in self.children(node) if self.tokens[child] == token), None)

    def path(self, node: int) -> list[int]:
        """The tokens on the path from the root to `node`; empty for the root."""
        tokens: list[int] = []
        while node != ROOT:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]


@dataclass(frozen=True)
class Offer:
    """A token that a source proposes after a node, with the source's probability."""

    token: int
    probability: float
    source: str = ""
    rank: int = 0
    """The rank among the offers of one pass, 0 for the likeliest.  All offers of a lookup have rank
    0, because only their probability counts."""


class Policy(Protocol):
    """Decides which tokens are worth their time.

    probability: the draft's probability of a token after its path.
    joint: the product of the probabilities on a path.  Nodes are compared by it.
    """

    def joint(self, joint: float, offer: Offer) -> float:
        """The joint probability of an offer after a path of joint probability `joint`."""
        ...

    def includes(self, probability: float, joint: float) -> bool:
        """True if the token is worth verifying."""
        ...

    def extends(self, probability: float, joint: float) -> bool:
        """True if the token is worth a draft pass for the tokens after it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The limits of a tree."""

    n_nodes: int
    """Draft tokens at most."""
    branching: Callable[[float], int] = lambda top: 1
    """The number of a node's children at most, given the draft's top probability there."""
    only_first_extends: bool = False
    """True: only the likeliest child gets children, as in SWIFT's caterpillar (§4.2)."""

    @property
    def is_chain(self) -> bool:
        """True if every node has at most one child."""
        return self.branching(0.0) == 1

    def sized(self, n_max: int, *, n_branches: int) -> Shape:
        """This shape with at most `n_max` nodes, and with no more branches than a context has."""
        return replace(self, n_nodes=n_max if self.is_chain else min(n_max, n_branches))


def caterpillar(top: float) -> int:
    """The number of candidates that SWIFT verifies at a position, by the top probability."""
    return 3 if top > 0.95 else 5 if top > 0.8 else 8 if top > 0.5 else 10


def grow(
    expand: Callable[[Tree, int], Sequence[Offer]],
    policy: Policy,
    shape: Shape,
    *,
    is_eog: Callable[[int], bool],
) -> Tree:
    """Grows the likeliest tree of at most `shape.n_nodes` nodes, best first by joint probability.

    expand: runs the draft on a node (ROOT first) and returns the likeliest tokens after it,
        likeliest first; empty if the draft cannot continue.  Each call costs a draft pass.
    """
    tree = Tree()
    serial = count()  # of two equal offers, the older one comes first
    offers: list[tuple[float, int, int, Offer, bool]] = []

    def extend(node: int, joint: float) -> None:
        found = expand(tree, node)
        kept = found[: shape.branching(found[0].probability)] if found else ()
        for rank, offer in enumerate(kept):
            value = policy.joint(joint, offer)
            may_extend = rank == 0 or not shape.only_first_extends
            heapq.heappush(offers, (-value, next(serial), node, offer, may_extend))

    if shape.n_nodes > 0:
        extend(ROOT, 1.0)
    while offers and len(tree) < shape.n_nodes:
        value, _, parent, offer, may_extend = heapq.heappop(offers)
        if not policy.includes(offer.probability, -value):
            continue
        if tree.child(parent, offer.token) is not None:  # already offered by another source
            continue
        node = tree.add(parent, offer, -value)
        if (
            may_extend
            and len(tree) < shape.n_nodes
            and not is_eog(offer.token)
            and policy.extends(offer.probability, -value)
        ):
            extend(node, -value)
    return tree


def grow_sampled(
    draw: Callable[
        [Tree, int, Callable[[float], int]], tuple[Sequence[Offer], Distribution | None]
    ],
    policy: Policy,
    shape: Shape,
    *,
    is_eog: Callable[[int], bool],
    source: str = "",
) -> Tree:
    """Grows a tree of sampled draft tokens, for speculative sampling.

    The rule is only exact if no sampled token is dropped.  So the number of a node's children is
    decided by the draft's top probability before they are sampled, and all of them stay, in their
    order.  The choice of the node that grows next may depend on the sampled tokens.

    draw: runs the draft on a node and samples its children.  Its last argument gives their number
        for a top probability.  It returns no proposal if the draft cannot continue.
    """
    proposals: dict[int, Distribution] = {}
    tree = Tree(proposals=proposals)
    serial = count()
    leaves: list[tuple[float, int, int]] = [(-1.0, next(serial), ROOT)]

    def width(top: float) -> int:
        if not policy.includes(top, policy.joint(joint, Offer(-1, top, source))):
            return 0
        return min(shape.branching(top), shape.n_nodes - len(tree))

    while leaves and len(tree) < shape.n_nodes:
        value, _, leaf = heapq.heappop(leaves)
        joint = -value
        drawn, proposal = draw(tree, leaf, width)
        if proposal is not None:
            proposals[leaf] = proposal
        for rank, offer in enumerate(drawn):
            below = policy.joint(joint, offer)
            node = tree.add(leaf, offer, below)
            may_extend = rank == 0 or not shape.only_first_extends
            if may_extend and not is_eog(offer.token) and policy.extends(offer.probability, below):
                heapq.heappush(leaves, (-below, next(serial), node))
    return tree
