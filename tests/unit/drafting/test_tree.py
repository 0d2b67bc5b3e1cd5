"""How draft trees grow, against brute force on small made-up drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_gguf.drafting.policy import Threshold
from swift_gguf.drafting.tree import (
    ROOT,
    Offer,
    Policy,
    Shape,
    Tree,
    caterpillar,
    grow,
    grow_sampled,
)
from swift_gguf.sampling.speculative import Distribution, draw_children

EOG = 0
EVERYTHING = Threshold(0.0)


def is_eog(token: int) -> bool:
    return token == EOG


@dataclass
class FakeDraft:
    """A distribution for every path; what was asked, in order."""

    seed: int
    n_vocab: int = 3
    spread: float = 1.0
    asked: list[int] = field(default_factory=list)

    def p(self, path: Sequence[int]) -> list[float]:
        logits = np.random.default_rng((self.seed, *path)).normal(size=self.n_vocab)
        weights = np.exp(self.spread * logits)
        return [float(weight) for weight in weights / weights.sum()]

    def offers(self, path: Sequence[int]) -> list[Offer]:
        """Likeliest first."""
        offers = [Offer(token, p) for token, p in enumerate(self.p(path))]
        return sorted(offers, key=lambda offer: -offer.probability)

    def expand(self, tree: Tree, node: int) -> list[Offer]:
        self.asked.append(node)
        return self.offers(tree.path(node))


drafts = st.builds(
    FakeDraft, st.integers(0, 10**6), st.integers(2, 3), st.sampled_from([0.5, 2.0, 4.0])
)
policies = st.builds(
    Threshold, st.sampled_from([0.0, 0.3, 0.45, 0.7]), st.sampled_from([1.0, 0.3, 0.05])
)


def wide(width: int, n_nodes: int, **options: bool) -> Shape:
    return Shape(n_nodes=n_nodes, branching=lambda top: width, **options)


def joint(tree: Tree, node: int) -> float:
    product = 1.0
    for probability in path_probabilities(tree, node):
        product *= probability
    return product


def path_probabilities(tree: Tree, node: int) -> list[float]:
    if node == ROOT:
        return []
    return [*path_probabilities(tree, tree.parents[node]), tree.probabilities[node]]


# -- trees -----------------------------------------------------------------------------------------

#        root
#       0    1
#      2 4   3
#        5
SMALL = Tree([7, 8, 9, 9, 6, 5], [ROOT, ROOT, 0, 1, 0, 4], [0.5, 0.4, 0.5, 0.9, 0.3, 1.0])


def test_a_tree_tells_children_and_paths() -> None:
    assert [SMALL.children(node) for node in (ROOT, 0, 1, 4, 5)] == [[0, 1], [2, 4], [3], [5], []]
    assert SMALL.path(5) == [7, 6, 5]
    assert SMALL.path(ROOT) == []
    assert (SMALL.child(0, 9), SMALL.child(1, 9), SMALL.child(ROOT, 9)) == (2, 3, None)
    assert len(SMALL) == 6


def test_a_chain_is_a_tree() -> None:
    chain = Tree.chain([4, 5, 6], [0.9, 0.8, 0.7])
    joints: list[Any] = [0.9, pytest.approx(0.72), pytest.approx(0.504)]
    assert chain == Tree(
        [4, 5, 6], [ROOT, 0, 1], [0.9, 0.8, 0.7], ["", "", ""], joints, ranks=[0, 0, 0]
    )
    assert Tree.chain([4]).probabilities == [1.0]
    assert len(Tree.chain([])) == 0


def test_a_tree_remembers_the_offers_it_is_made_of() -> None:
    tree = Tree()
    offers = [Offer(7, 0.5, "one"), Offer(8, 0.4, "two"), Offer(9, 0.5, "two")]
    nodes = [tree.add(parent, offers[i], 0.1 * i) for i, parent in enumerate((ROOT, ROOT, 0))]
    assert nodes == [0, 1, 2]
    assert [tree.offer(node) for node in nodes] == offers
    assert tree.joints == [0.0, 0.1, 0.2]
    assert tree.path(2) == [7, 9]


def test_a_cut_tree_is_its_own_beginning() -> None:
    tree = Tree.chain([4, 5, 6], [0.9, 0.8, 0.7])
    for n in range(4):
        assert tree.cut(n) == Tree.chain([4, 5, 6][:n], [0.9, 0.8, 0.7][:n])
    tree.cut(1).add(0, Offer(9, 0.5), 0.5)
    assert len(tree) == 3


# -- chains ----------------------------------------------------------------------------------------


def greedy_chain(draft: FakeDraft, p_min: float, n: int) -> tuple[list[int], int]:
    """The likeliest token again and again; and how many draft passes that took."""
    tokens: list[int] = []
    passes = 0
    while len(tokens) < n and EOG not in tokens:
        best = draft.offers(tokens)[0]
        passes += 1
        if best.probability < p_min:
            break
        tokens.append(best.token)
    return tokens, passes


@settings(deadline=None)
@given(drafts, st.floats(0, 1), st.integers(0, 8))
def test_a_chain_is_the_greedy_one_above_the_threshold(
    draft: FakeDraft, p_min: float, n: int
) -> None:
    tree = grow(draft.expand, Threshold(p_min), Shape(n_nodes=n), is_eog=is_eog)
    tokens, passes = greedy_chain(draft, p_min, n)
    probabilities = [draft.p(tokens[:i])[token] for i, token in enumerate(tokens)]
    assert tree == Tree.chain(tokens, probabilities)
    assert draft.asked == list(range(-1, passes - 1))


def test_what_the_chains_above_are() -> None:
    """Every way to stop is among them, or the property says little."""
    ends = set()
    for seed in range(50):
        draft = FakeDraft(seed)
        tokens, passes = greedy_chain(draft, 0.5, 4)
        unsure = passes == len(tokens) + 1
        ends.add("unsure" if unsure else "eog" if tokens[-1] == EOG else "full")
    assert ends == {"unsure", "eog", "full"}


# -- trees of the likeliest tokens -----------------------------------------------------------------


def likeliest(draft: FakeDraft, n: int, width: int) -> list[tuple[int, ...]]:
    """The n likeliest paths of all up to n tokens, best first."""
    paths: list[tuple[float, tuple[int, ...]]] = []
    level: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
    for _ in range(n):
        level = [
            (value * offer.probability, (*path, offer.token))
            for value, path in level
            if EOG not in path
            for offer in draft.offers(path)[:width]
        ]
        paths += level
    return [path for _, path in sorted(paths, key=lambda item: -item[0])[:n]]


@settings(deadline=None, max_examples=60)
@given(drafts, st.integers(0, 6), st.integers(1, 4))
def test_best_first_is_the_n_likeliest_nodes(draft: FakeDraft, n: int, width: int) -> None:
    tree = grow(draft.expand, EVERYTHING, wide(width, n), is_eog=is_eog)
    assert [tuple(tree.path(node)) for node in range(len(tree))] == likeliest(draft, n, width)


def assert_sound(tree: Tree, draft: FakeDraft, policy: Policy, shape: Shape) -> None:
    """What holds for every tree of likeliest tokens, whatever the policy."""
    assert len(tree) <= shape.n_nodes
    assert all(ROOT <= parent < node for node, parent in enumerate(tree.parents))
    assert len({tuple(tree.path(node)) for node in range(len(tree))}) == len(tree)
    values = [joint(tree, node) for node in range(len(tree))]
    for node, parent in enumerate(tree.parents):
        offers = draft.offers(tree.path(parent))[: shape.branching(0.0)]
        assert Offer(tree.tokens[node], tree.probabilities[node]) in offers
        assert policy.includes(tree.probabilities[node], values[node])
    # a draft pass for each node that may have children, when it comes in, and for no other
    extended = [
        node
        for node in range(len(tree))
        if node + 1 < shape.n_nodes
        and tree.tokens[node] != EOG
        and policy.extends(tree.probabilities[node], values[node])
        and (
            not shape.only_first_extends
            or tree.tokens[node] == draft.offers(tree.path(tree.parents[node]))[0].token
        )
    ]
    assert draft.asked == ([ROOT, *extended] if shape.n_nodes else [])
    assert set(tree.parents) <= set(draft.asked)
    # nothing likelier was left out: neither after what was extended nor for want of places
    if values:
        full = len(tree) == shape.n_nodes
        for node in draft.asked:
            if full and node == len(tree) - 1:
                continue
            for offer in draft.offers(tree.path(node))[: shape.branching(0.0)]:
                value = (joint(tree, node) if node != ROOT else 1.0) * offer.probability
                if tree.child(node, offer.token) is None:
                    wanted = policy.includes(offer.probability, value)
                    assert not wanted or (full and value <= min(values) + 1e-12)


@settings(deadline=None, max_examples=200)
@given(drafts, policies, st.integers(0, 12), st.integers(1, 3), st.booleans())
def test_any_policy_grows_a_sound_tree(
    draft: FakeDraft, policy: Threshold, n: int, width: int, only_first: bool
) -> None:
    shape = wide(width, n, only_first_extends=only_first)
    assert_sound(grow(draft.expand, policy, shape, is_eog=is_eog), draft, policy, shape)


def test_an_unsure_token_does_not_stand_in_the_way_of_less_likely_ones() -> None:
    offers = {ROOT: [Offer(1, 0.55), Offer(2, 0.45)], 0: [Offer(3, 0.6)], 1: [Offer(4, 0.4)]}
    tree = grow(lambda tree, node: offers[node], Threshold(0.5), wide(2, 9), is_eog=is_eog)
    assert (tree.tokens, tree.parents) == ([1, 3], [ROOT, 0])


def test_of_equals_the_older_comes_first() -> None:
    tree = grow(
        lambda tree, node: [Offer(1, 1.0), Offer(2, 1.0)], EVERYTHING, wide(2, 5), is_eog=is_eog
    )
    assert (tree.tokens, tree.parents) == ([1, 2, 1, 2, 1], [ROOT, ROOT, 0, 0, 1])


def test_a_draft_that_offers_nothing_ends_there() -> None:
    assert len(grow(lambda tree, node: [], EVERYTHING, wide(2, 5), is_eog=is_eog)) == 0


def test_a_token_two_sources_offer_is_there_once_by_the_likelier() -> None:
    offers = {
        ROOT: [Offer(1, 0.5, "one"), Offer(1, 0.7, "two"), Offer(2, 0.3, "one")],
        0: [Offer(1, 0.1, "one")],  # after another path it is another token
    }
    tree = grow(lambda tree, node: offers.get(node, []), EVERYTHING, wide(3, 9), is_eog=is_eog)
    assert (tree.tokens, tree.parents) == ([1, 2, 1], [ROOT, ROOT, 0])
    assert tree.sources == ["two", "one", "one"]


def test_nodes_are_compared_by_what_the_policy_makes_of_them() -> None:
    class Favours(Threshold):
        def joint(self, joint: float, offer: Offer) -> float:
            return joint * {"poor": 0.1, "good": 0.9}[offer.source]

    offers = {ROOT: [Offer(1, 0.99, "poor"), Offer(2, 0.5, "good")], 0: [Offer(3, 0.2, "good")]}
    tree = grow(lambda tree, node: offers.get(node, []), Favours(0.0), wide(2, 9), is_eog=is_eog)
    assert tree.tokens == [2, 3, 1]
    assert tree.joints == [0.9, pytest.approx(0.81), 0.1]
    assert tree.sources == ["good", "good", "poor"]


# -- SWIFT's caterpillar ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top", "siblings"),
    [(1.0, 3), (0.951, 3), (0.95, 5), (0.801, 5), (0.8, 8), (0.501, 8), (0.5, 10), (0.0, 10)],
)
def test_the_table_of_the_paper(top: float, siblings: int) -> None:
    assert caterpillar(top) == siblings


def test_a_caterpillar_grows_at_its_head_only() -> None:
    widths = set()
    for seed in range(60):
        draft = FakeDraft(seed, n_vocab=12, spread=1.0 + seed % 5)
        shape = Shape(n_nodes=60, branching=caterpillar, only_first_extends=True)
        tree = grow(draft.expand, EVERYTHING, shape, is_eog=is_eog)
        for node, parent in pairwise(reversed(draft.asked)):
            assert tree.parents[node] == parent
            assert tree.children(parent)[0] == node
        if len(tree) < shape.n_nodes:  # it ended by itself, so that every sibling had a place
            assert tree.tokens[tree.children(draft.asked[-1])[0]] == EOG
            for node in draft.asked:
                top = draft.offers(tree.path(node))[0].probability
                assert len(tree.children(node)) == caterpillar(top)
                widths.add(caterpillar(top))
    assert widths == {3, 5, 8, 10}


# -- trees of drawn tokens -------------------------------------------------------------------------


@dataclass
class FakeDraws(FakeDraft):
    """Draws from the made-up distributions, and notes what it did."""

    drawn: dict[int, list[int]] = field(default_factory=dict)
    widths: dict[int, int] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    """Of the tree, when it was asked."""
    luck: int = 0

    def q(self, path: Sequence[int]) -> Distribution:
        p = np.array(self.p(path))
        return Distribution(np.arange(self.n_vocab, dtype=np.int32), p / p.sum())

    def draw(
        self, tree: Tree, node: int, width: Callable[[float], int]
    ) -> tuple[list[Offer], Distribution]:
        q = self.q(tree.path(node))
        self.asked.append(node)
        self.sizes.append(len(tree))
        self.widths[node] = width(float(q.p.max()))
        rng = np.random.default_rng((self.luck, len(self.asked)))
        self.drawn[node] = draw_children(q, self.widths[node], rng)
        assert width(float(q.p.max())) == self.widths[node], "the number depends on the draw"
        return [Offer(token, q.of(token)) for token in self.drawn[node]], q


draws = st.builds(
    FakeDraws,
    st.integers(0, 10**6),
    st.integers(2, 6),
    st.sampled_from([0.5, 2.0, 4.0]),
    luck=st.integers(0, 10**6),
)


@settings(deadline=None, max_examples=200)
@given(draws, policies, st.integers(0, 12), st.integers(1, 4), st.booleans())
def test_all_that_is_drawn_stays_in_order(
    draft: FakeDraws, policy: Threshold, n: int, width: int, only_first: bool
) -> None:
    shape = wide(width, n, only_first_extends=only_first)
    tree = grow_sampled(draft.draw, policy, shape, is_eog=is_eog)
    assert len(tree) <= n
    assert all(ROOT <= parent < node for node, parent in enumerate(tree.parents))
    assert set(tree.proposals) == set(draft.asked)
    assert len(draft.asked) == len(set(draft.asked))
    for node in range(-1, len(tree)):
        children = [tree.tokens[child] for child in tree.children(node)]
        assert children == draft.drawn.get(node, [])
    for node, q in tree.proposals.items():
        assert (q.p == draft.q(tree.path(node)).p).all()
        for child in tree.children(node):
            assert tree.probabilities[child] == q.of(tree.tokens[child])
    assert draft.asked[:1] == ([ROOT] if n else [])


@settings(deadline=None, max_examples=200)
@given(draws, policies, st.integers(1, 12), st.integers(1, 4))
def test_how_many_are_drawn_is_decided_by_the_top_alone(
    draft: FakeDraws, policy: Threshold, n: int, width: int
) -> None:
    tree = grow_sampled(draft.draw, policy, wide(width, n), is_eog=is_eog)
    for node, size in zip(draft.asked, draft.sizes, strict=True):
        top = max(draft.p(tree.path(node)))
        included = policy.includes(top, joint(tree, node) * top if node != ROOT else top)
        assert draft.widths[node] == (min(width, n - size) if included else 0)


@settings(deadline=None, max_examples=200)
@given(draws, policies, st.integers(1, 12), st.integers(1, 4), st.booleans())
def test_the_likeliest_leaf_is_drawn_from_next(
    draft: FakeDraws, policy: Threshold, n: int, width: int, only_first: bool
) -> None:
    shape = wide(width, n, only_first_extends=only_first)
    tree = grow_sampled(draft.draw, policy, shape, is_eog=is_eog)

    def may_extend(node: int) -> bool:
        first = tree.children(tree.parents[node])[0] == node or not only_first
        worth = policy.extends(tree.probabilities[node], joint(tree, node))
        return first and worth and tree.tokens[node] != EOG

    waiting = {node for node in range(len(tree)) if may_extend(node)}
    for i, node in enumerate(draft.asked[1:], start=1):
        there = {leaf for leaf in waiting if leaf < draft.sizes[i]}
        assert node in there
        assert joint(tree, node) >= max(joint(tree, leaf) for leaf in there) - 1e-12
        waiting.remove(node)
    assert len(tree) == n or not waiting


def test_an_unlikely_token_stays_once_it_is_drawn() -> None:
    """To leave it out would favour the likely ones; it only is not built upon."""
    for luck in range(200):
        draft = FakeDraws(3, n_vocab=6, spread=2.0, luck=luck)
        p_min = max(draft.p([]))  # only the likeliest token is that likely
        tree = grow_sampled(draft.draw, Threshold(p_min), Shape(n_nodes=1), is_eog=is_eog)
        assert len(tree) == 1
        if tree.probabilities[0] < p_min:
            longer = FakeDraws(3, n_vocab=6, spread=2.0, luck=luck)
            tree = grow_sampled(longer.draw, Threshold(p_min), Shape(n_nodes=4), is_eog=is_eog)
            assert len(tree) == len(longer.asked) == 1
            return
    pytest.fail("luck never drew an unlikely token")
