"""SWIFT's own search: its start, its budget, its stops, its Gaussian process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from swift_gguf.errors import SwiftError
from swift_gguf.search.objective import Outcome
from swift_gguf.search.paper import PaperOptions, PaperSearch
from swift_gguf.search.proposals import gaussian_process
from swift_gguf.search.space import Space
from swift_gguf.subnetwork import SubNetwork
from tests.unit.search_model import SyntheticModel, SyntheticWindow

SPACE = Space(12, range(12), range(12))
SMALL = Space(6, range(6), range(6))
PLAIN = PaperOptions(bayes=False)


@dataclass
class Scripted:
    """A window whose score is a function of the sub-network; remembers what was asked."""

    matchness: Callable[[SubNetwork], float]
    asked: list[SubNetwork] = field(default_factory=list)

    @property
    def key(self) -> Hashable:
        return 0

    def score(self, subnetwork: SubNetwork) -> Outcome:
        self.asked.append(subnetwork)
        agrees = np.arange(100) < round(100 * self.matchness(subnetwork))
        return Outcome(agrees, np.ones(100, np.float32))


def run(options: PaperOptions, window: Scripted, space: Space = SPACE) -> PaperSearch:
    search = PaperSearch(space, options)
    while not search.done:
        search.step(window)
    search.step(window)  # of no effect
    return search


def test_the_start_is_uniform_and_never_scored() -> None:
    pytest.importorskip("bayes_opt", reason="needs the extra search")
    search = PaperSearch(SPACE)
    assert (search.best, search.best_score) == (SubNetwork.uniform(12), 0.0)
    window = Scripted(lambda _: 0.01)
    search.step(window)
    assert search.best == window.asked[0] != SubNetwork.uniform(12)


def test_every_candidate_has_the_budget_and_the_ends() -> None:
    window = Scripted(lambda _: 0.5)
    run(replace(PLAIN, max_tolerance=60), window)
    for subnetwork in window.asked:
        assert len(subnetwork.skip_attn) + len(subnetwork.skip_ffn) == int(20 * 0.45)
        assert not {0, 11} & (subnetwork.skip_attn | subnetwork.skip_ffn)
    assert len(set(window.asked)) > 55


def test_only_a_better_score_replaces() -> None:
    scores = iter([0.5, 0.5, 0.6, 0.4, 0.6])
    window = Scripted(lambda _: next(scores))
    search = PaperSearch(SPACE, PLAIN)
    bests = []
    for _ in range(5):
        search.step(window)
        bests.append(window.asked.index(search.best))
    assert bests == [0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("options", "matchness", "n_steps"),
    [
        (PLAIN, 0.96, 1),
        (replace(PLAIN, max_score=0.97, max_steps=4), 0.97, 5),  # above, not at
        (replace(PLAIN, max_tolerance=7), 0.5, 9),  # the first is a gain, then more than 7 without
        (replace(PLAIN, max_tolerance=7), 0.0, 8),
        (replace(PLAIN, max_steps=10), 0.5, 11),
    ],
)
def test_it_stops_as_published(options: PaperOptions, matchness: float, n_steps: int) -> None:
    window = Scripted(lambda _: matchness)
    run(options, window)
    assert len(window.asked) == n_steps


def test_every_so_many_candidates_one_is_the_gaussian_process_s() -> None:
    """It must see every result: with one sub-layer that matters it learns to keep it."""
    pytest.importorskip("bayes_opt", reason="needs the extra search")
    options = PaperOptions(bayes_interval=8, max_steps=31, max_score=2)
    window = Scripted(lambda s: 0.2 if 2 in s.skip_ffn else 0.8)
    run(options, window, SMALL)
    same = Scripted(window.matchness)
    run(replace(options, bayes=False), same, SMALL)
    differing = [i for i, pair in enumerate(zip(window.asked, same.asked)) if pair[0] != pair[1]]  # noqa: B905
    assert differing == [7, 15, 23, 31]
    assert not any(2 in window.asked[i].skip_ffn for i in differing)


def test_it_takes_repeated_points_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bayes_opt", reason="needs the extra search")
    rng = np.random.default_rng(0)
    scored = [(SPACE.every(ffn=2), 0.5), (SPACE.every(ffn=2), 0.7), (SPACE.every(attn=2), 0.6)]
    found = gaussian_process(SPACE, scored, 7, rng)
    assert len(found.skip_attn) + len(found.skip_ffn) == 7
    assert capfd.readouterr() == ("", "")


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bayes_opt", None)
    PaperSearch(SPACE, PLAIN)
    with pytest.raises(SwiftError, match=r"pip install 'swift-gguf\[search\]'"):
        PaperSearch(SPACE)


def test_the_same_seed_is_the_same_search() -> None:
    model = SyntheticModel.plant(SPACE, 0)
    bests = []
    for seed in (1, 1, 2):
        search = PaperSearch(SPACE, replace(PLAIN, seed=seed))
        for i in range(30):
            search.step(SyntheticWindow(model, i))
        bests.append(search.best)
    assert bests[0] == bests[1] != bests[2]


@pytest.mark.parametrize("wrong", [{"skip_ratio": 0.0}, {"skip_ratio": 1.0}, {"bayes_interval": 0}])
def test_options_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        PaperOptions(**wrong)  # type: ignore[arg-type]
