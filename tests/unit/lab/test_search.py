"""The experiments with searches and drafting: statistics, tables; without a model."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.cold import Cold, ColdAnswer
from lab.drafting import PLAIN, Run, summarize
from lab.drafting import Report as DraftingReport
from lab.drafting import plot as plot_drafting
from lab.drafting import render as render_drafting
from lab.output import markdown
from lab.search import Method, best_by_cost
from lab.search_report import (
    Checkpoint,
    Estimate,
    Options,
    Report,
    interval,
    mean_error,
    plot,
    render,
    score,
    varied,
)
from swift_gguf.planning.cost import Costs
from swift_gguf.search.objective import Outcome, Window
from swift_gguf.subnetwork import SubNetwork

N_LAYER = 4
COSTS = Costs(
    pass_ms=((1, 10.0), (2, 11.0), (8, 14.0)),
    attention_ms=(1.0,) * N_LAYER,
    ffn_ms=(1.0,) * N_LAYER,
    kv_ms=(0.0,) * N_LAYER,
    head_ms=2.0,
    n_kv=200,
)


def without(*ffn: int) -> SubNetwork:
    return SubNetwork(n_layer=N_LAYER, skip_ffn=frozenset(ffn))


def outcome(agrees: list[bool]) -> Outcome:
    return Outcome(np.array(agrees), np.ones(len(agrees), dtype=np.float32))


# -- searching -------------------------------------------------------------------------------------


class Text:
    """A window on which nothing agrees; `log` hears what is scored, and where."""

    def __init__(self, key: Hashable, log: list[Hashable]) -> None:
        self.key, self._log = key, log

    def score(self, subnetwork: SubNetwork) -> Outcome:
        self._log.append(self.key)
        return outcome([False])


class Counting:
    """A search that is done after some steps, and holds another best after the first."""

    def __init__(self, steps: int = 1000) -> None:
        self.best, self._left = without(1), steps

    @property
    def done(self) -> bool:
        return self._left == 0

    def step(self, window: Window) -> None:
        window.score(without(1))
        self._left -= 1
        self.best = without(2)


def test_a_method_goes_on_where_it_left_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))  # every look at the clock takes a second, so a step does
    monkeypatch.setattr("lab.search.perf_counter", lambda: next(now))
    log: list[Hashable] = []
    method = Method("it", Counting(), own_past=False, steps=2)
    for text, until in (("x", 3), ("y", 4), ("x", 6)):
        method.work(text, [Text((text, i), log) for i in range(2)], until=until)
    assert log == [("x", 0), ("x", 0), ("x", 1), ("y", 0), ("x", 1), ("x", 0)]
    assert [(point.seconds, point.steps) for point in method.checkpoints] == [
        (3, 3),
        (4, 4),
        (6, 6),
    ]
    assert len(method.scored[without(1)]) == 6


def test_what_a_late_step_brings_counts_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr("lab.search.perf_counter", lambda: next(now))
    method = Method("it", Counting(), own_past=False, steps=2)
    for until in (0.3, 0.6, 1.0):
        method.work("x", [Text(0, [])], until=until)
    assert [point.best for point in method.checkpoints] == [without(1), without(1), without(2)]
    assert [point.steps for point in method.checkpoints] == [1, 1, 1]


def test_a_finished_search_keeps_its_best() -> None:
    method = Method("it", Counting(steps=2), own_past=True, steps=1)
    for until in (60, 120):
        method.work("x", [Text(0, [])], until=until)
    assert [(point.seconds, point.steps) for point in method.checkpoints] == [(60, 2), (120, 2)]


def test_the_best_of_each_cost() -> None:
    good, bad = [outcome([True] * 32)], [outcome([False] * 32)]
    # one FFN less is 0.9 of a pass, two are 0.8
    best = best_by_cost(
        {without(1): bad * 2, without(2): good * 2, without(1, 2): bad * 2, without(3): good}, COSTS
    )
    assert best == {"ours, cost 0.8-0.9": without(1, 2), "ours, cost 0.9-1.0": without(2)}


# -- statistics ------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_the_interval_holds_the_share(agrees: list[bool]) -> None:
    low, high = interval(np.array(agrees))
    assert 0 <= low <= np.mean(agrees) + 1e-9
    assert np.mean(agrees) - 1e-9 <= high <= 1


def test_dependent_positions_say_less() -> None:
    independent = np.random.default_rng(0).random(640) < 0.5
    runs = np.repeat(independent[:20], 32)
    widths = [high - low for low, high in map(interval, (independent, runs))]
    assert widths[0] == pytest.approx(4 * 0.5 / 640**0.5, rel=0.3)
    assert widths[1] > 3 * widths[0]


def test_few_positions_leave_it_open() -> None:
    low, high = interval(np.arange(16) < 8)
    assert low < 0.5 < high


@given(st.dictionaries(st.integers(), st.floats(0, 1), max_size=20), st.integers(1, 8))
def test_varied_keys_span_the_range(values: dict[int, float], n: int) -> None:
    chosen = varied(values, n)
    assert len(set(chosen)) == len(chosen) == min(n, len(values))
    if len(chosen) > 1:
        assert {min(values.values()), max(values.values())} <= {values[key] for key in chosen}


def test_varied_keys_are_even() -> None:
    values = dict.fromkeys(range(10), 0.9) | {10: 0.1, 11: 0.5}
    assert set(varied(values, 3)) == {10, 11, 0}


def test_score() -> None:
    found = score(without(1, 2), [outcome([True] * 30 + [False] * 10)] * 2, COSTS)
    assert found.pass_share == pytest.approx(0.8)
    assert (found.agreement, found.positions) == (0.75, 80)
    assert found.low < 0.75 < found.high


ESTIMATE = Estimate(pass_share=0.5, own_past=0.4, target_past=0.75, live_first=0.8, live_judged=0.7)


def test_mean_error() -> None:
    both = [ESTIMATE, replace(ESTIMATE, own_past=1.0)]
    assert mean_error(both, "own_past", "live_first") == pytest.approx((0.4 + 0.2) / 2)


# -- drafting --------------------------------------------------------------------------------------


def run(mode: str, prompt: int, *, tokens: int, cycle_s: float, **changes: object) -> Run:
    values = Run(
        mode=mode,
        prompt=prompt,
        round=0,
        tokens=tokens,
        cycle_s=cycle_s,
        draft_s=0.0,
        verify_s=cycle_s,
        cycles=tokens // 2,
        cycle_n=tokens,
        drafted=tokens,
        accepted=tokens // 2,
        ids=(1, 2, 3),
    )
    return replace(values, **changes)  # type: ignore[arg-type]


RUNS = [
    run(PLAIN, 0, tokens=10, cycle_s=1.0),
    run("m", 0, tokens=10, cycle_s=0.5),
    run(PLAIN, 1, tokens=30, cycle_s=3.0),
    run("m", 1, tokens=30, cycle_s=6.0, ids=(1, 2, 4)),
    run("m", 2, tokens=30, cycle_s=1.0),  # interrupted before it was answered plainly
]


def test_modes_are_compared_by_prompt_and_in_all() -> None:
    found = summarize("m", RUNS)
    assert found is not None
    assert found.ratio is not None
    assert (found.ratio.min, found.ratio.median, found.ratio.n) == (0.5, 1.25, 2)
    assert found.total_ratio == pytest.approx((40 / 6.5) / 10)
    assert (found.diverged, found.answers) == (1, 2)
    assert (found.acceptance, found.mean_length, found.drafted_a_cycle) == (0.5, 2.0, 2.0)


def test_rounds_of_a_prompt_are_one_value() -> None:
    again = [replace(run, round=1, cycle_s=2 * run.cycle_s) for run in RUNS]
    found = summarize("m", [*RUNS, *again])
    assert found is not None
    assert found.ratio is not None
    assert found.ratio.n == 2
    assert found.answers == 4


def test_answers_without_a_cycle_do_not_count() -> None:
    empty = [run(mode, 0, tokens=0, cycle_s=0.0) for mode in (PLAIN, "m")]
    assert summarize("m", empty) is None
    assert summarize("m", RUNS + [replace(item, prompt=7) for item in empty]) == summarize(
        "m", RUNS
    )


def test_cold_costs_are_of_all_time() -> None:
    answer = ColdAnswer(
        prompt_s=1.0, cycle_s=3.0, search_s=0.5, tokens=9, steps=4, predicted_speedup=None
    )
    cold = Cold(best=without(1), answers=[answer, answer])
    assert cold.total_s == 8.0
    assert cold.share == pytest.approx(0.125)
    assert "not known yet" in cold.line()
    assert json.loads(json.dumps(cold.as_dict()))["best"] == {"skip_attn": "", "skip_ffn": "1"}
    assert Cold().share == 0.0


# -- reports ---------------------------------------------------------------------------------------


def report() -> Report:
    good, bad = [outcome([True] * 40)], [outcome([True, False] * 20)]
    return Report(
        options=Options(),
        costs=COSTS,
        runs={
            "ours": [Checkpoint(seconds=6, steps=5, best=without(1))],
            "paper, r=0.3": [
                Checkpoint(seconds=6, steps=7, best=without(1, 2)),
                Checkpoint(seconds=12, steps=9, best=without(2)),
            ],
        },
        named={"ours": without(1), "every 2nd FFN": without(1, 2)},
        scores={
            without(1): score(without(1), good, COSTS),
            without(2): score(without(2), bad, COSTS),
            without(1, 2): score(without(1, 2), bad, COSTS),
        },
        estimates={without(1): ESTIMATE},
    )


def test_tables() -> None:
    text = render(report())
    assert "| ours | FFN 1 | 0.90 | 1.000 (1.000-1.000) |" in text
    assert "| FFN 1 | 0.50 | 0.400 | 0.750 | 0.800 | 0.700 |" in text
    assert "| own past (paper) | 0.400 | 0.300 |" in text
    assert "| target's past | 0.050 | 0.050 |" in text


def test_an_interrupted_report_is_one() -> None:
    partial = replace(report(), scores={}, estimates={})
    assert render(partial) == ""
    found = json.loads(json.dumps(partial.as_dict()))
    assert found["runs"]["ours"][0] == {
        "seconds": 6,
        "steps": 5,
        "skip_attn": "",
        "skip_ffn": "1",
    }
    assert render_drafting(DraftingReport()) == ""
    assert json.dumps(DraftingReport().as_dict())


def test_markdown() -> None:
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| :-- | --: |\n| 1 | 2 |"


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(report(), tmp_path / "search.png")
    plot(Report(options=Options()), tmp_path / "empty.png")
    plot_drafting(DraftingReport(runs=RUNS, subnetwork=without(1)), tmp_path / "drafting.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG"), path
