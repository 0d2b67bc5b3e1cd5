"""The search on a synthetic model whose truth is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_gguf.errors import DecodeError, SubnetworkError
from swift_gguf.search.drift import DriftWatch
from swift_gguf.search.harm import Evidence, Scored, estimate
from swift_gguf.search.objective import Outcome
from swift_gguf.search.optimizer import MAX_CHALLENGERS, MAX_PORTFOLIO, Search, Searcher
from swift_gguf.search.paper import PaperOptions, PaperSearch
from swift_gguf.search.proposals import MAX_MOVES, HarmModel, LocalMove, Proposer, RandomSubset
from swift_gguf.search.space import Space
from swift_gguf.subnetwork import SubNetwork
from tests.unit.search_model import SyntheticModel, SyntheticWindow

SPACE = Space(12, range(12), range(12))
PLAIN_RATE = 1e3 / 95
NOTHING = SubNetwork(n_layer=12)


def drive(
    search: Searcher,
    model: SyntheticModel,
    steps: int,
    *,
    n: int = 128,
    per: int = 10,
    text: int = 0,
) -> None:
    for i in range(steps):
        search.step(SyntheticWindow(model, 1000 * text + i // per, n))


def optimum(model: SyntheticModel) -> float:
    """The true rate that adding or dropping one sub-layer at a time leads to."""
    skip, best = np.zeros(model.space.size, dtype=bool), 0.0
    while True:
        flips = skip ^ np.eye(len(skip), dtype=bool)
        rates = [model.true_rate(model.space.subnetwork(flip)) for flip in flips if flip.any()]
        if max(rates) <= best:
            return best
        best = max(rates)
        skip = [flip for flip in flips if flip.any()][int(np.argmax(rates))]


# -- what it finds ---------------------------------------------------------------------------------


def test_it_comes_near_the_optimum_and_beats_the_paper() -> None:
    shares, papers = [], []
    for seed in range(3):
        model = SyntheticModel.plant(SPACE, seed)
        search = Search(SPACE, model.costs, seed=seed)
        paper = PaperSearch(SPACE, PaperOptions(bayes=False, seed=seed))
        drive(search, model, 150)
        drive(paper, model, 150)
        best = optimum(model)
        shares.append(model.true_rate(search.best) / best)
        papers.append(model.true_rate(paper.best) / best)
    assert np.mean(shares) > 0.97
    assert min(shares) > 0.94
    assert np.mean(papers) < np.mean(shares) - 0.03


def test_planted_no_ops_are_found_and_nothing_else_is_skipped() -> None:
    model = SyntheticModel.plant(SPACE, 3, no_ops=8)
    model = replace(model, harms=np.where(model.harms > 0, 1.0, 0.0))
    search = Search(SPACE, model.costs)
    drive(search, model, 450, n=128)
    assert search.best == SPACE.subnetwork(model.harms == 0)
    assert search.rate(search.best).agreement == 1.0


def test_known_sub_networks_are_used_at_once() -> None:
    model = SyntheticModel.plant(SPACE, 1)
    long = Search(SPACE, model.costs)
    drive(long, model, 200)
    again = Search(SPACE, model.costs, known=[item.subnetwork for item in long.knowledge()])
    assert again.best == long.best
    drive(again, model, 20, text=1)
    assert model.true_rate(again.best) > 0.99 * model.true_rate(long.best)


def test_a_known_one_of_another_build_is_left_aside() -> None:
    known = [SubNetwork(n_layer=12, skip_ffn=frozenset({0})), SubNetwork(n_layer=13)]
    model = SyntheticModel.plant(SPACE, 0)
    assert Search(SPACE, model.costs, known=known).best == Search(SPACE, model.costs).best


@dataclass(frozen=True)
class EqualModel(SyntheticModel):
    """All sub-networks draft equally well and cost the same: every difference is luck."""

    def harm(self, subnetwork: SubNetwork) -> float:
        return 0.15 if subnetwork in (KNOWN, CURSED) else 0.17

    @property
    def costs(self) -> FlatCosts:  # type: ignore[override]
        return FlatCosts()


class FlatCosts:
    def draft_ms(self, subnetwork: SubNetwork) -> float:
        return 40.0

    def verify_ms(self, width: int) -> float:
        return 95.0 + 3 * width


KNOWN = SPACE.every(ffn=3)
CURSED = SPACE.every(ffn=3, attn=5)


def test_luck_does_little_harm() -> None:
    """200 candidates, all a little worse than what is known, on windows of 32 tokens."""
    model = EqualModel(SPACE, np.zeros(SPACE.size))
    worst = model.true_rate(SPACE.uniform()) / model.true_rate(KNOWN)
    kept = []
    for seed in range(4):
        search = Search(SPACE, model.costs, known=[KNOWN], seed=seed)
        for i in range(200):
            search.step(SyntheticWindow(model, 1000 * seed + i // 10))
        kept.append(model.true_rate(search.best) / model.true_rate(KNOWN))
    assert worst < 0.985
    assert np.mean(kept) > (1 + worst) / 2


# -- how it behaves --------------------------------------------------------------------------------


class CountingWindow:
    def __init__(self, window: SyntheticWindow, *, fails: bool = False) -> None:
        self.key = window.key
        self.asked: list[SubNetwork] = []
        self._window, self._fails = window, fails

    def score(self, subnetwork: SubNetwork) -> Outcome:
        self.asked.append(subnetwork)
        if self._fails:
            raise DecodeError("no; try again")
        return self._window.score(subnetwork)


def searchers() -> Iterator[tuple[Searcher, Searcher]]:
    costs = SyntheticModel.plant(SPACE, 0).costs
    yield Search(SPACE, costs, seed=5), Search(SPACE, costs, seed=5)
    options = PaperOptions(bayes=False, seed=5)
    yield PaperSearch(SPACE, options), PaperSearch(SPACE, options)


def test_a_step_scores_once_and_a_failed_one_has_not_happened() -> None:
    model = SyntheticModel.plant(SPACE, 0)
    for troubled, smooth in searchers():
        for i in range(60):
            window = SyntheticWindow(model, i // 6)
            failing, counting = CountingWindow(window, fails=True), CountingWindow(window)
            with pytest.raises(DecodeError):
                troubled.step(failing)
            troubled.step(counting)
            assert failing.asked == counting.asked
            assert len(counting.asked) == 1
            other = CountingWindow(window)
            smooth.step(other)
            assert other.asked == counting.asked
            assert smooth.best == troubled.best


def test_the_same_seed_is_the_same_search_and_another_is_not() -> None:
    model, asked = SyntheticModel.plant(SPACE, 0), []
    for seed in (1, 1, 2):
        search, windows = Search(SPACE, model.costs, seed=seed), []
        for i in range(40):
            windows.append(CountingWindow(SyntheticWindow(model, i // 8)))
            search.step(windows[-1])
        asked.append(list(chain.from_iterable(window.asked for window in windows)))
    assert asked[0] == asked[1] != asked[2]


def test_a_window_is_used_for_the_incumbent_then_challengers_then_new_ones() -> None:
    model = SyntheticModel.plant(SPACE, 2)
    search = Search(SPACE, model.costs)
    drive(search, model, 40, per=40)
    window = CountingWindow(SyntheticWindow(model, 99))
    expected = [search.best, *search._challengers]
    seen = set(search._records)
    assert len(expected) > 1
    for _ in range(12):
        search.step(window)
    assert window.asked[: len(expected)] == expected
    assert len(set(window.asked)) == 12  # nothing twice on a window
    assert not seen.issuperset(window.asked[len(expected) :])


def test_what_a_candidate_was_discovered_on_proves_nothing() -> None:
    """A single window, however long it is used, replaces the incumbent by nothing."""
    model = SyntheticModel.plant(SPACE, 0)
    search = Search(SPACE, model.costs)
    drive(search, model, 12, per=1000)
    start = search.best
    drive(search, model, 100, per=1000)
    assert search.best == start
    assert len(search._challengers) == MAX_CHALLENGERS


def test_it_ends_and_then_scores_nothing() -> None:
    model = SyntheticModel.plant(SPACE, 0)
    search = Search(SPACE, model.costs, patience=10)
    for i in range(1000):
        if search.done:
            break
        search.step(SyntheticWindow(model, i // 8))
    assert search.done
    window = CountingWindow(SyntheticWindow(model, 10**6))
    search.step(window)
    assert window.asked == []


def test_challengers_get_another_window_before_the_end() -> None:
    model = SyntheticModel.plant(SPACE, 0)
    search = Search(SPACE, model.costs, patience=20)
    for _ in range(30):
        search.step(SyntheticWindow(model, 0))
    assert search._challengers
    assert not search.done
    for _ in range(20):
        search.step(SyntheticWindow(model, 0))
    assert search.done  # there was none


@pytest.mark.parametrize("space", [Space(4, [1], []), Space(4, [], [1, 2]), Space(3, [1], [1])])
def test_a_tiny_space_ends_soon(space: Space) -> None:
    model = SyntheticModel.plant(space, 0)
    search = Search(space, model.costs)
    for i in range(100):
        search.step(SyntheticWindow(model, i // 10))
    assert search.done
    assert search.best in space


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swift_gguf.search.optimizer.MAX_RECORDS", 30)
    model = SyntheticModel.plant(SPACE, 0)
    search = Search(SPACE, model.costs)
    drive(search, model, 400, n=32, per=5)
    assert len(search._records) <= 30
    assert search.best in search._records
    assert max(len(record.outcomes) for record in search._records.values()) <= 16


# -- another text ----------------------------------------------------------------------------------


def test_it_recovers_when_the_text_changes_and_remembers_the_old() -> None:
    first, second = (
        replace(model, harms=np.where(model.harms > 0, 0.5, 0.0))
        for model in (SyntheticModel.plant(SPACE, seed, no_ops=8) for seed in (0, 1))
    )
    search = Search(SPACE, first.costs)
    drive(search, first, 150)
    old = search.best
    stale = second.true_rate(old)
    search.reopen()
    assert not search.done
    drive(search, second, 150, text=10**4)
    assert second.true_rate(search.best) > 1.05 * stale
    assert search.portfolio[:2] == [search.best, old]
    new = search.best
    search.reopen()
    drive(search, first, 20, text=10**5)  # back again: no search is needed
    assert search.best == old
    assert search.portfolio[:2] == [old, new]


def test_falling_acceptance_reopens() -> None:
    model = SyntheticModel.plant(SPACE, 0)
    search = Search(SPACE, model.costs, patience=20)
    drive(search, model, 200)
    rng = np.random.default_rng(0)
    for _ in range(500):
        search.observe(int((rng.random(4) < 0.8).cumprod().sum()), 4)
    assert search.done
    for _ in range(100):
        search.observe(int((rng.random(4) < 0.35).cumprod().sum()), 4)
    assert not search.done


def test_steady_or_rising_acceptance_raises_no_alarm() -> None:
    alarms = 0
    for seed in range(20):
        rng, watch = np.random.default_rng(seed), DriftWatch()
        for i in range(1000):
            p = 0.6 if i < 500 else 0.6 + 0.1 * (seed % 2)
            alarms += watch.observe(int((rng.random(5) < p).cumprod().sum()), 5)
    assert alarms == 0


# -- what it tells ---------------------------------------------------------------------------------


def test_knowledge_is_of_the_portfolio_incumbent_first() -> None:
    model = SyntheticModel.plant(SPACE, 0)
    known = [SPACE.random(np.random.default_rng(i), 4) for i in range(6)]  # too many
    search = Search(SPACE, model.costs, known=known)
    assert search.knowledge() == []
    drive(search, model, 60)
    knowledge = search.knowledge()
    found = [item.subnetwork for item in knowledge]
    assert found[: len(search.portfolio)] == search.portfolio
    assert len(set(found)) == len(found) == 8
    assert knowledge[0].subnetwork == search.best
    assert len(set(search.portfolio)) == len(search.portfolio) == MAX_PORTFOLIO
    assert knowledge[0].rate == search.rate(search.best)
    assert knowledge[0].rate.positions >= 128


# -- proposals and the harm model ------------------------------------------------------------------


def evidence(model: SyntheticModel, n: int, *, seed: int = 0) -> Evidence:
    rng, scored = np.random.default_rng(seed), []
    for i in range(n):
        subnetwork = SPACE.random(rng, 5)
        outcome = model.outcome(subnetwork, 200, i)
        scored.append(Scored(subnetwork, 200, float(outcome.agrees.sum())))
    return Evidence(SPACE, model.costs, SPACE.every(ffn=3), scored, 8)


def test_harms_are_learned_from_groups() -> None:
    model = replace(SyntheticModel.plant(SPACE, 0), interaction=0.0)
    few, many = (estimate(SPACE, evidence(model, n).scored) for n in (5, 150))
    planted = model.harms
    assert np.corrcoef(many.mean, planted)[0, 1] > 0.85
    spreads = [np.sqrt((harms.root**2).sum(axis=1)) for harms in (estimate(SPACE, []), few, many)]
    assert (spreads[0] > spreads[1]).all()
    assert (spreads[1] > spreads[2]).all()
    inside = np.abs(many.mean - planted) < 3 * spreads[2] + 0.02
    assert inside.mean() > 0.8


def test_no_evidence_is_the_prior() -> None:
    harms = estimate(SPACE, [])
    assert len(set(harms.mean.round(12))) == 1
    assert (harms.sample(np.random.default_rng(0)) >= 0).all()


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([RandomSubset(0.45), LocalMove(), HarmModel()]),
    st.integers(0, 10**6),
    st.integers(0, 6),
)
def test_proposals_stay_inside_the_space(proposer: Proposer, seed: int, n_scored: int) -> None:
    known = evidence(SyntheticModel.plant(SPACE, 0), n_scored)
    candidate = proposer.propose(known, np.random.default_rng(seed))
    assert candidate is not None
    assert candidate in SPACE
    assert candidate == proposer.propose(known, np.random.default_rng(seed))
    if isinstance(proposer, LocalMove):
        changed = SPACE.mask(candidate) ^ SPACE.mask(known.incumbent)
        assert changed.sum() <= 2 * MAX_MOVES  # a swap changes two


# -- the space -------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=SPACE.size, max_size=SPACE.size))
def test_masks_and_sub_networks_are_the_same(skip: list[bool]) -> None:
    subnetwork = SPACE.subnetwork(np.array(skip))
    assert SPACE.mask(subnetwork).tolist() == skip
    assert subnetwork in SPACE
    assert not {0, 11} & (subnetwork.skip_attn | subnetwork.skip_ffn)


def test_a_space_of_some_layers() -> None:
    space = Space(8, [5, 3, 0, 3], [7, 2])
    assert (space.attn, space.ffn, space.size) == ((3, 5), (2,), 3)
    assert space.uniform() == SubNetwork(n_layer=8, skip_attn=frozenset({3, 5}))
    assert [str(single) for single in space.singles()] == [
        "without attention 3",
        "without attention 5",
        "without FFN 2",
    ]
    assert SubNetwork(n_layer=8, skip_ffn=frozenset({3})) not in space


@pytest.mark.parametrize(("attn", "words"), [([9], "does not exist"), ([0, 7], "may be skipped")])
def test_a_space_that_makes_no_sense_is_refused(attn: list[int], words: str) -> None:
    with pytest.raises(SubnetworkError, match=words):
        Space(8, attn, [])
