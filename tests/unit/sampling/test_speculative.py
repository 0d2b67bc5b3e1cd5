"""Speculative sampling: the law of what is emitted is the target's, by summing over every outcome.

Nothing here is estimated but the two tests that say so: `Round` says what happens and how likely it
is, and `choose` does nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from swift_gguf.errors import SamplingError
from swift_gguf.sampling.speculative import Distribution, Round, choose, draw, draw_children, rounds

Rule = Callable[[Distribution, Distribution, Sequence[int]], Iterator[Round]]
Law = NDArray[np.float64]
TOLERANCE = 1e-12
IDS = (2, 3, 5, 8, 13)
"""Tokens are not their places."""

# mass from nothing to nearly everything; small ones test the rounding
WEIGHTS = st.sampled_from([0.0, 0.0, 1e-300, 1e-17, 1e-9]) | st.floats(0.01, 1)


def of(weights: Sequence[float]) -> Distribution:
    """The distribution of IDS proportional to `weights`."""
    values = np.array(weights, np.float64)
    return Distribution(np.array(IDS[: len(weights)], np.int32), values / values.sum())


def distributions(n: int) -> st.SearchStrategy[Distribution]:
    return st.lists(WEIGHTS, min_size=n, max_size=n).filter(lambda w: sum(w) > 1e-3).map(of)


def dense(distribution: Distribution) -> Law:
    return distribution.of_all(np.array(IDS, np.int32))


# -- laws, exactly ---------------------------------------------------------------------------------


def force_accept(p: Distribution, q: Distribution, children: Sequence[int]) -> Iterator[Round]:
    """The control: what the draft says goes."""
    yield from (Round(child, 1.0, None) for child in children[:1])


def no_residual(p: Distribution, q: Distribution, children: Sequence[int]) -> Iterator[Round]:
    """Another control: after a rejection the target draws from p, as if nothing had been tried."""
    for verdict in rounds(p, q, children):
        yield Round(verdict.child, verdict.acceptance, verdict.residual and p)


def draws(q: Distribution, k: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every list of children that `draw_children` may return, with its probability."""
    if k == 0:
        yield (), 1.0
        return
    for token, probability in zip(q.ids.tolist(), q.p.tolist(), strict=True):
        if probability > 0:
            rest = q.without(token)
            for tail, below in draws(rest, k - 1) if rest else [((), 1.0)]:
                yield (token, *tail), probability * below


def verdict_law(p: Distribution, q: Distribution, children: Sequence[int], rule: Rule) -> Law:
    """The law of `choose(p, q, children)`, over IDS."""
    law, reached = np.zeros(len(IDS)), 1.0
    for verdict in rule(p, q, children):
        law[IDS.index(verdict.child)] += reached * verdict.acceptance
        if verdict.residual is None:
            return law
        reached *= 1 - verdict.acceptance
        p = verdict.residual
    return law + reached * dense(p)


def emitted_law(p: Distribution, q: Distribution, k: int, rule: Rule = rounds) -> Law:
    laws = (weight * verdict_law(p, q, children, rule) for children, weight in draws(q, k))
    return sum(laws, np.zeros(len(IDS)))


def pair_law(
    targets: Sequence[Distribution],
    drafts: Sequence[Distribution],
    widths: tuple[int, int],
    rule: Rule = rounds,
) -> Law:
    """The joint law of the first two tokens emitted with a tree of depth 2.

    targets, drafts: after nothing, then after each of IDS.  widths: children of the root and of
    each of them.  Where the first token is no child, the next cycle draws the second one, plainly.
    """
    (p, *p_after), (q, *q_after) = targets, drafts
    joint = np.zeros((len(IDS), len(IDS)))
    for children, weight in draws(q, widths[0]):
        # all of the tree is drawn before any of it is verified
        below = [list(draws(q_after[IDS.index(child)], widths[1])) for child in children]
        for leaves in product(*below):
            tree = {child: leaf for child, (leaf, _) in zip(children, leaves, strict=True)}
            drawn = weight * np.prod([chance for _, chance in leaves])
            for place, first in enumerate(verdict_law(p, q, children, rule)):
                second = verdict_law(p_after[place], q_after[place], tree.get(IDS[place], ()), rule)
                joint[place] += drawn * first * second
    return joint


@settings(deadline=None)
@given(st.data(), st.integers(2, 5))
def test_any_number_of_children_keeps_the_law(data: st.DataObject, n: int) -> None:
    p, q = data.draw(distributions(n)), data.draw(distributions(n))
    for k in range(n + 1):
        assert emitted_law(p, q, k) == pytest.approx(dense(p), abs=TOLERANCE)


P, Q = of([0.1, 0.2, 0.0, 0.3, 0.4]), of([0.3, 0.3, 0.2, 0.2, 0.0])
DISJOINT = of([1, 2, 0, 0, 0]), of([0, 0, 3, 2, 1])


@pytest.mark.parametrize(("p", "q"), [(P, Q), (Q, P), DISJOINT, (P, P)])
def test_known_pairs_keep_the_law(p: Distribution, q: Distribution) -> None:
    for k in range(6):
        assert emitted_law(p, q, k) == pytest.approx(dense(p), abs=TOLERANCE)


def test_wrong_rules_are_noticed() -> None:
    for rule, k in product((force_accept, no_residual), (1, 2)):
        assert np.abs(emitted_law(P, Q, k, rule) - dense(P)).max() > 0.05
    assert emitted_law(P, Q, 1, force_accept) == pytest.approx(dense(Q), abs=TOLERANCE)


def three(weights: Sequence[Sequence[float]]) -> list[Distribution]:
    return [of([*row, 0, 0]) for row in weights]


TARGETS = three([(5, 3, 2), (1, 0, 9), (4, 4, 2), (0, 1, 0), (1, 1, 1), (1, 1, 1)])
DRAFTS = three([(2, 3, 5), (5, 5, 0), (0, 3, 7), (1, 1, 1), (1, 1, 1), (1, 1, 1)])


@pytest.mark.parametrize("widths", [(0, 0), (1, 0), (1, 1), (2, 1), (1, 2), (2, 2), (3, 2)])
def test_a_chain_and_a_tree_keep_the_joint_law(widths: tuple[int, int]) -> None:
    first, *after = map(dense, TARGETS)
    expected = np.array(after) * first[:, None]
    assert pair_law(TARGETS, DRAFTS, widths) == pytest.approx(expected, abs=TOLERANCE)
    if widths[0] > 0:
        forced = pair_law(TARGETS, DRAFTS, widths, force_accept)
        assert np.abs(forced - expected).max() > 0.05


@settings(deadline=None)
@given(st.data(), st.integers(2, 4))
def test_a_residual_holds_no_child(data: st.DataObject, n: int) -> None:
    p, q = data.draw(distributions(n)), data.draw(distributions(n))
    for children, _ in draws(q, n):
        for i, verdict in enumerate(rounds(p, q, children)):
            assert verdict.child == children[i]
            assert 0 <= verdict.acceptance <= 1
            if verdict.residual is None:
                assert verdict.acceptance == 1
            else:
                assert not any(verdict.residual.of(child) for child in children[: i + 1])


def test_a_good_draft_is_never_rejected() -> None:
    assert [verdict.acceptance for verdict in rounds(P, P, P.ids.tolist()[:1])] == [1.0]


def test_equal_up_to_rounding_is_accepted() -> None:
    """p(x) < q(x), but p - q is positive nowhere: there is nothing to draw instead."""
    p = Distribution(np.array(IDS, np.int32), np.array([0.5 - 1e-16, 0.5, 0, 0, 0]))
    q = Distribution(np.array(IDS, np.int32), np.array([0.5, 0.5, 0, 0, 0]))
    assert p.of(IDS[0]) < q.of(IDS[0])
    (verdict,) = rounds(p, q, [IDS[0]])
    assert (verdict.acceptance, verdict.residual) == (1.0, None)


def test_a_child_the_draft_cannot_have_drawn_is_refused() -> None:
    for q, children in ((None, [2]), (Q, [13]), (of([1, 0]), [2, 3]), (Q, [2, 2])):
        with pytest.raises(SamplingError, match="cannot have been drawn"):
            list(rounds(of([0, 0, 0, 0, 1]), q, children))


# -- draws -----------------------------------------------------------------------------------------


class Scripted(np.random.Generator):
    """Gives the numbers it is told to, and minds being asked for more."""

    def __init__(self, *numbers: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.numbers = list(numbers)

    def random(self) -> float:  # type: ignore[override]
        return self.numbers.pop(0)


def test_a_draw_gives_each_token_its_share_of_the_unit_interval() -> None:
    distribution = of([3, 0, 8, 4, 1])
    grid = [draw(distribution, Scripted((i + 0.5) / 16)) for i in range(16)]
    assert Counter(grid) == {2: 3, 5: 8, 8: 4, 13: 1}
    assert grid == sorted(grid)


def test_the_ends_of_the_unit_interval_are_tokens_with_probability() -> None:
    distribution = of([0, 1, 0, 3, 0])
    assert draw(distribution, Scripted(0.0)) == 3
    assert draw(distribution, Scripted(0.25)) == 8
    assert draw(distribution, Scripted(np.nextafter(1, 0))) == 8


def test_children_are_distinct_and_no_more_than_there_are() -> None:
    rng = np.random.default_rng(0)
    for k in range(7):
        children = draw_children(Q, k, rng)
        assert len(children) == len(set(children)) == min(k, 4)
        assert 13 not in children


def test_a_child_is_drawn_from_what_is_left() -> None:
    q = of([1, 1, 2])
    # of 2, 3, 5 by halves and quarters; then of 2, 3 by halves
    assert draw_children(q, 2, Scripted(0.6, 0.49)) == [5, 2]
    assert draw_children(q, 2, Scripted(0.6, 0.51)) == [5, 3]
    assert draw_children(q, 3, Scripted(0.1, 0.34, 0.9)) == [2, 5, 3]


def test_choose_does_what_the_rounds_say() -> None:
    p, q = of([1, 3]), of([3, 1])  # child 2 is accepted by a third, else 3 it is
    assert choose(p, q, [2], Scripted(0.33)) == 2
    assert choose(p, q, [2], Scripted(0.34, 0.0)) == 3
    assert choose(p, q, [2, 3], Scripted(0.34)) == 3  # certain: no number is needed
    assert choose(p, q, [3], Scripted()) == 3
    assert choose(p, None, [], Scripted(0.2)) == 2


def test_estimated_all_together_keeps_the_law() -> None:
    rng, n = np.random.default_rng(1), 4000
    counts = Counter(choose(P, Q, draw_children(Q, 2, rng), rng) for _ in range(n))
    expected = {token: n * P.of(token) for token in IDS if P.of(token)}
    assert set(counts) == set(expected)
    # 3 degrees of freedom: 16.3 is exceeded once in a thousand seeds
    assert sum((counts[t] - e) ** 2 / e for t, e in expected.items()) < 16.3


def test_estimated_children_follow_the_law_of_draws() -> None:
    rng, n = np.random.default_rng(2), 4000
    counts = Counter(tuple(draw_children(Q, 2, rng)) for _ in range(n))
    expected = {children: n * chance for children, chance in draws(Q, 2)}
    assert set(counts) == set(expected)
    # 12 ordered pairs, 11 degrees of freedom
    assert sum((counts[c] - e) ** 2 / e for c, e in expected.items()) < 31.3


def test_a_seed_determines_everything() -> None:
    def run(seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return [choose(P, Q, draw_children(Q, 3, rng), rng) for _ in range(50)]

    assert run(3) == run(3) != run(4)


# -- distributions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "p"),
    [
        ([], []),
        ([1, 2], [1.0]),
        ([2, 1], [0.5, 0.5]),
        ([1, 1], [0.5, 0.5]),
        ([1, 2], [0.5, 0.4]),
        ([1, 2], [1.5, -0.5]),
        ([1, 2], [0.5, np.nan]),
    ],
)
def test_what_is_no_distribution_is_refused(ids: list[int], p: list[float]) -> None:
    with pytest.raises(SamplingError):
        Distribution(np.array(ids, np.int32), np.array(p))


def test_tokens_outside_have_no_probability() -> None:
    assert [Q.of(token) for token in (0, 2, 4, 8, 13, 99)] == [0, Q.p[0], 0, Q.p[3], 0, 0]


def test_softmax_of_ids_in_any_order() -> None:
    logits = np.log(np.array([1, 5, 2], np.float32))
    distribution = Distribution.softmax(np.array([7, 1, 4], np.int32), logits + 500)
    assert distribution.ids.tolist() == [1, 4, 7]
    assert distribution.p == pytest.approx([5 / 8, 2 / 8, 1 / 8], abs=1e-6)


def test_excluded_tokens_are_left_out() -> None:
    logits = np.array([-np.inf, 0, -np.inf], np.float32)
    distribution = Distribution.softmax(np.arange(3, dtype=np.int32), logits)
    assert (distribution.ids.tolist(), distribution.p.tolist()) == ([1], [1.0])


@pytest.mark.parametrize("logits", [[], [-np.inf, -np.inf], [np.nan, 0], [np.inf, 0]])
def test_nothing_to_draw_is_an_error_of_one_line(logits: list[float]) -> None:
    with pytest.raises(SamplingError, match="check the grammar") as caught:
        Distribution.softmax(np.arange(len(logits), dtype=np.int32), np.array(logits, np.float32))
    assert "\n" not in str(caught.value)
