"""The objective: against brute force, its invariants, and what its standard error promises."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_gguf.search.objective import P_MIN_GRID, Objective, Outcome
from swift_gguf.search.space import Space
from swift_gguf.subnetwork import SubNetwork
from tests.unit.search_model import CPU, GPU, SyntheticCosts, SyntheticModel

SPACE = Space(12, range(12), range(12))
MILD = SPACE.every(ffn=4)
BOLD = SPACE.every(attn=2, ffn=2)
COSTS = SyntheticCosts(12)


def outcome(agrees: list[bool], confidence: list[float]) -> Outcome:
    return Outcome(np.array(agrees), np.array(confidence, dtype=np.float32))


# confidences at the very borders of the grid, too
CONFIDENCES = st.one_of(st.floats(0, 1, width=32), st.sampled_from(P_MIN_GRID))
OUTCOMES = st.lists(st.tuples(st.booleans(), CONFIDENCES), min_size=1, max_size=40).map(
    lambda rows: outcome([row[0] for row in rows], [row[1] for row in rows])
)


@dataclass(frozen=True)
class Plain:
    """Everything at the cost of a plain pass."""

    def draft_ms(self, subnetwork: SubNetwork) -> float:
        return 10.0

    def verify_ms(self, width: int) -> float:
        return 10.0


def brute_force(outcomes: list[Outcome], d: int, p_min: float, costs: SyntheticCosts) -> float:
    """Drafts at every position, token by token, as drafting and verification do."""
    tokens = cost = 0.0
    for window in outcomes:
        n = len(window)
        for start in range(n):
            drafted = passes = 0
            while drafted < d:
                passes += 1
                if window.confidence[(start + drafted) % n] < np.float32(p_min):
                    break
                drafted += 1
            accepted = 0
            while accepted < drafted and window.agrees[(start + accepted) % n]:
                accepted += 1
            tokens += accepted + 1
            cost += passes * costs.draft_ms(MILD) + costs.verify_ms(drafted + 1)
    positions = sum(map(len, outcomes))
    plain = costs.verify_ms(1)
    if tokens / cost >= 1 / plain:
        return 1e3 * tokens / cost
    return 1e3 * (tokens - positions) / (cost - positions * plain)


@settings(deadline=None, max_examples=40)
@given(st.lists(OUTCOMES, min_size=1, max_size=3), st.sampled_from([CPU, GPU]))
def test_the_rate_is_that_of_drafting_everywhere(
    outcomes: list[Outcome], verify: tuple[float, ...]
) -> None:
    costs = SyntheticCosts(12, verify=verify)
    rate = Objective(costs=costs, draft_max=4).rate(MILD, outcomes)
    found = {(d, p): brute_force(outcomes, d, p, costs) for d in range(1, 5) for p in P_MIN_GRID}
    assert rate.value == pytest.approx(max(found.values()))
    assert found[rate.draft_max, rate.p_min] == pytest.approx(rate.value)
    pays = rate.speedup >= 1
    assert (rate.value == rate.tokens_per_s) == pays
    assert rate.value <= rate.tokens_per_s or pays
    assert rate.speedup == pytest.approx(rate.tokens_per_s * costs.verify_ms(1) / 1e3)
    assert rate.positions == sum(map(len, outcomes))


@settings(deadline=None)
@given(OUTCOMES, st.integers(1, 8), st.integers(0, 39))
def test_invariants_of_a_rate(window: Outcome, draft_max: int, turn: int) -> None:
    objective = Objective(costs=COSTS, draft_max=draft_max)
    rate = objective.rate(MILD, [window])
    assert rate.value >= 0
    assert 1 <= rate.draft_max <= draft_max
    # a ring has no beginning, and the same again changes nothing
    turned = Outcome(np.roll(window.agrees, turn), np.roll(window.confidence, turn))
    assert objective.rate(MILD, [turned]).value == pytest.approx(rate.value)
    again = objective.rate(MILD, [window, window])
    assert again.value == pytest.approx(rate.value)
    # agreeing more never hurts, nor does more choice, nor a cheaper draft
    better = Outcome(np.ones_like(window.agrees), window.confidence)
    assert objective.rate(MILD, [better]).value >= rate.value * (1 - 1e-12)
    fixed = replace(objective, p_min=0.5).rate(MILD, [window])
    assert fixed.p_min == 0.5
    assert fixed.value <= rate.value * (1 + 1e-12)
    assert objective.rate(BOLD, [window]).value >= rate.value * (1 - 1e-12)


def test_a_perfect_draft_has_a_known_rate() -> None:
    window = outcome([True] * 5, [1.0] * 5)  # shorter than the draft: the ring goes round
    rate = Objective(costs=Plain(), draft_max=8).rate(MILD, [window])
    assert (rate.draft_max, rate.p_min, rate.agreement) == (8, 0.0, 1.0)
    assert rate.tokens_per_s == pytest.approx(9 / 0.09)


def test_a_draft_that_is_cheap_and_wrong_is_worth_nothing() -> None:
    """Its rate would be near plain's, and above that of an honest draft that does not pay yet."""
    costs = SyntheticCosts(12, verify=CPU)
    wrong = Outcome(np.zeros(64, bool), np.zeros(64, np.float32))
    often = Outcome(np.arange(64) % 4 > 0, np.full(64, 0.9, np.float32))
    objective = Objective(costs=costs)
    cheap, honest = objective.rate(BOLD, [wrong]), objective.rate(MILD, [often])
    assert cheap.value == 0 < honest.value
    assert objective.compare(MILD, BOLD, [(often, wrong)]).difference > 0


def test_the_pass_that_stops_a_draft_is_paid() -> None:
    window = outcome([True] * 4, [0.1] * 4)
    rate = Objective(costs=Plain(), draft_max=3, p_min=0.5).rate(MILD, [window])
    assert rate.tokens_per_s == pytest.approx(1 / 0.02)


def test_a_hole_in_the_verification_costs_is_used() -> None:
    window = outcome([True] * 40, [1.0] * 40)
    for draft_max, best in ((2, 1), (3, 3)):
        costs = SyntheticCosts(12, ffn_ms=0.0, verify=(95, 100, 260, 120))
        assert Objective(costs=costs, draft_max=draft_max).rate(MILD, [window]).draft_max == best


def test_doubts_that_are_right_are_heeded() -> None:
    rng = np.random.default_rng(0)
    agrees = rng.random(2000) < 0.5
    telling = Outcome(agrees, np.where(agrees, 0.95, 0.05).astype(np.float32))
    mute = Outcome(agrees, np.full(2000, 0.5, np.float32))
    objective = Objective(costs=SyntheticCosts(12, attn_ms=0.0, ffn_ms=0.0, verify=CPU))
    assert objective.rate(MILD, [telling]).p_min > 0
    assert objective.rate(MILD, [telling]).value > 1.05 * objective.rate(MILD, [mute]).value


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(OUTCOMES, st.booleans()), min_size=1, max_size=4))
def test_a_comparison_is_antisymmetric(windows: list[tuple[Outcome, bool]]) -> None:
    pairs = [
        (window, Outcome(~window.agrees, window.confidence) if flip else window)
        for window, flip in windows
    ]
    objective = Objective(costs=COSTS, draft_max=4)
    there = objective.compare(MILD, BOLD, pairs)
    back = objective.compare(BOLD, MILD, [(b, a) for a, b in pairs])
    assert there.difference == pytest.approx(-back.difference)
    assert there.standard_error == pytest.approx(back.standard_error)
    rates = [objective.rate(s, [p[i] for p in pairs]) for i, s in enumerate((MILD, BOLD))]
    assert there.difference == pytest.approx(rates[0].value - rates[1].value)
    assert there.positions == rates[0].positions


def test_the_same_outcomes_differ_by_nothing() -> None:
    window = SyntheticModel.plant(SPACE, 0).outcome(MILD, 200, 1)
    comparison = Objective(costs=COSTS).compare(MILD, MILD, [(window, window)])
    assert (comparison.difference, comparison.standard_error) == (0.0, 0.0)


def test_too_few_positions_tell_nothing() -> None:
    window = outcome([True] * 16, [1.0] * 16)
    objective = Objective(costs=COSTS, draft_max=8)
    assert math.isinf(objective.compare(MILD, BOLD, [(window, window)]).standard_error)
    longer = outcome([True] * 17, [1.0] * 17)
    assert math.isfinite(objective.compare(MILD, BOLD, [(longer, longer)]).standard_error)


@pytest.mark.parametrize("n", [32, 256])
def test_the_standard_error_is_the_spread_of_the_difference(n: int) -> None:
    model = SyntheticModel.plant(SPACE, 1)
    objective = Objective(costs=model.costs)
    windows = 512 // n
    found = [
        objective.compare(
            MILD,
            BOLD,
            [
                (model.outcome(MILD, n, seed), model.outcome(BOLD, n, seed))
                for seed in range(1000 * i, 1000 * i + windows)
            ],
        )
        for i in range(60)
    ]
    spread = np.std([comparison.difference for comparison in found])
    claimed = np.sqrt(np.mean([comparison.standard_error**2 for comparison in found]))
    assert 0.7 < claimed / spread < 1.4
    unpaired = [
        Objective(costs=model.costs)
        .compare(
            MILD,
            BOLD,
            [
                (model.outcome(MILD, n, seed), model.outcome(BOLD, n, 10**6 + seed))
                for seed in range(1000 * i, 1000 * i + windows)
            ],
        )
        .standard_error
        for i in range(10)
    ]
    assert claimed < 0.95 * np.mean(unpaired)  # what pairing is for


@pytest.mark.parametrize(
    "make",
    [
        lambda: Outcome(np.ones(2, bool), np.ones(3, np.float32)),
        lambda: Outcome(np.ones(0, bool), np.ones(0, np.float32)),
        lambda: Outcome(np.ones((2, 2), bool), np.ones((2, 2), np.float32)),
        lambda: Objective(costs=COSTS, draft_max=0),
        lambda: Objective(costs=COSTS).rate(MILD, []),
    ],
)
def test_what_makes_no_sense_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError):
        make()
