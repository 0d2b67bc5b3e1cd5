"""`swift-gguf bench` without a model: modes by name, sums, the file of a run, tables, ties."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift_gguf.bench.contenders import speculation_options
from swift_gguf.bench.modes import Mode, parse_modes, sweep
from swift_gguf.bench.subject import Machine, Subject
from swift_gguf.bench.suite_report import Report, Result, Summary, total
from swift_gguf.bench.suite_table import plot, render
from swift_gguf.bench.suites import CODE_EDITING, EVERYDAY, load, pick
from swift_gguf.bench.ties import explain, is_bit_invariant
from swift_gguf.errors import SuiteError, SwiftError
from swift_gguf.speculation import SpeculationOptions
from swift_gguf.stats import SourceStats, Stats
from swift_gguf.suite import Row

# -- modes -----------------------------------------------------------------------------------------


def test_modes_by_name() -> None:
    modes = parse_modes("auto, ngram:8,ngram+layer-skip,plain,auto,prompt-lookup")
    names = [mode.name for mode in modes]
    assert names == ["plain", "auto", "ngram:8", "ngram+layer-skip", "prompt-lookup"]
    assert modes[2] == Mode("ngram", 8)
    assert modes[3].sources == ("ngram", "layer-skip")
    assert [mode.name for mode in modes if mode.is_peer] == ["prompt-lookup"]
    assert [mode.name for mode in modes if mode.is_fixed] == ["ngram:8"]


@pytest.mark.parametrize(
    "text",
    ["fast", "ngram+", "ngram+ngram", "ngram+auto", "auto:8", "plain:1", "ngram:0", "ngram:65",
     "ngram:x", "ngram:", "prompt-lookup:3", "off"],
)  # fmt: skip
def test_other_names_are_none(text: str) -> None:
    with pytest.raises(SwiftError, match=r"no mode|not a fixed setting"):
        parse_modes(text)


def test_a_sweep_is_of_fixed_modes_that_have_names() -> None:
    names = ",".join(mode.name for mode in sweep())
    assert parse_modes(names)[1:] == sweep()
    assert all(mode.is_fixed for mode in sweep())


def test_what_a_mode_asks_of_speculation() -> None:
    options = speculation_options(Mode("layer-skip", 4), draft_model=None)
    assert (options.mode, options.draft_max, options.search) == ("layer-skip", 4, "off")
    assert speculation_options(Mode("auto"), draft_model=None).search == "auto"
    own = SpeculationOptions(skip_ffn=frozenset({1}), tree="caterpillar", search="paper")
    options = speculation_options(Mode("layer-skip"), own, draft_model=None)
    assert options == replace(own, mode="layer-skip")
    options = speculation_options(Mode("ngram"), own, draft_model=None)
    assert options == SpeculationOptions(mode="ngram")
    assert speculation_options(Mode("plain"), draft_model=None).mode == "off"


# -- sums and ratios -------------------------------------------------------------------------------

PAIRS = st.lists(
    st.tuples(st.integers(2, 200), st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1
)


def result(mode: str, unit: int, tokens: int, seconds: float, **more: Any) -> Result:
    stats = Stats(predicted_n=tokens, cycle_s=seconds, prompt_s=1.0, cycles=tokens, cycle_n=tokens)
    given: dict[str, Any] = {"category": "x", "question_id": str(unit), "turn": 0} | more
    return Result(mode=mode, unit=unit, stats=stats, **given)


@given(PAIRS)
def test_a_speedup_is_tokens_over_time_against_the_same_of_plain(
    values: list[tuple[int, float, float]],
) -> None:
    pairs = [
        (result("auto", i, n, ours), result("plain", i, n, plain))
        for i, (n, ours, plain) in enumerate(values)
    ]
    summary = Summary.of(pairs)
    ours, plain = (math.fsum(value[i] for value in values) for i in (1, 2))
    assert summary.tokens == sum(n - 1 for n, _, _ in values)
    assert summary.speedup == pytest.approx(plain / ours)
    assert summary.tokens_per_second == pytest.approx(summary.tokens / ours)
    assert summary.end_to_end_speedup == pytest.approx((plain + len(values)) / (ours + len(values)))
    assert summary.requests_s == pytest.approx(ours + len(values))
    assert summary.first_token_s.median == 1.0
    spread = summary.speedup_by_request
    assert spread is not None
    ratios = sorted(plain / ours for _, ours, plain in values)
    assert spread.min == pytest.approx(ratios[0])
    assert ratios[0] <= spread.median * (1 + 1e-9)


def test_answers_of_one_token_have_no_speed() -> None:
    summary = Summary.of([(result("auto", 0, 1, 0.0), result("plain", 0, 1, 0.0))])
    assert summary.speedup is None
    assert summary.speedup_by_request is None
    assert summary.tokens_per_second is None
    assert summary.end_to_end_speedup == 1.0
    json.dumps(summary.as_dict(), allow_nan=False)


def with_drafts(*accepted: int) -> Stats:
    source = SourceStats()
    for n in accepted:
        source.count(drafted=4, accepted=n)
    return Stats(predicted_n=9, cycles=len(accepted), cycle_s=1.0, sources={"ngram": source})


def test_generations_add_up_and_stay_as_they_are() -> None:
    first, second = with_drafts(3, 0), with_drafts(3)
    both = total([first, second])
    assert (both.drafted, both.accepted, both.cycles, both.cycle_s) == (12, 6, 3, 2.0)
    assert both.sources["ngram"].as_dict()["accepted_length_histogram"] == [1, 0, 0, 2]
    assert first.sources["ngram"].as_dict()["accepted_length_histogram"] == [1, 0, 0, 1]


# -- a run -----------------------------------------------------------------------------------------

MACHINE = Machine(cpu="cpu", cores=2, system="Linux", load=0.0)
SUBJECT = Subject(
    name="m.gguf",
    description="tiny",
    n_bytes=1,
    n_layer=4,
    n_threads=2,
    device="cpu",
    llama_commit="0",
)


def report(modes: str = "auto", **more: Any) -> Report:
    values: dict[str, Any] = {
        "settings": {"model": "m", "n_predict": 8},
        "modes": parse_modes(modes),
        "swept": [],
        "machine": MACHINE,
        "subject": SUBJECT,
        "bit_invariant": True,
        "units": 3,
    }
    return Report(**values | more)


def filled(modes: str = "auto,ngram:4,ngram:8,prompt-lookup") -> Report:
    found = report(modes)
    seconds = {"plain": 4.0, "auto": 2.5, "ngram:4": 2.0, "ngram:8": 8.0, "prompt-lookup": 4.0}
    for unit, category in enumerate(("a", "b")):
        for mode in found.modes:
            # on b, plain decoding is best
            time = seconds[mode.name] if category == "a" or mode.name == "plain" else 5.0
            found.results.append(result(mode.name, unit, 9, time, category=category))
    return found


def test_the_limit_is_the_best_fixed_setting_or_plain() -> None:
    found = filled()
    limit = found.limit("a")
    assert limit is not None
    assert (limit.mode, limit.speedup) == ("ngram:4", 2.0)
    assert limit.auto_share == pytest.approx(1.6 / 2)
    other = found.limit("b")
    assert other is not None
    assert (other.mode, other.speedup) == ("plain", 1.0)
    assert filled("auto").limit() is None


def test_only_our_answers_of_an_invariant_model_are_a_bug() -> None:
    found = filled()
    assert found.broken == 0
    found.results.append(result("prompt-lookup", 2, 9, 1.0, diverged=True))
    assert found.broken == 0
    found.results.append(result("auto", 2, 9, 1.0, diverged=True))
    assert found.broken == 1
    found.bit_invariant = False
    assert found.broken == 0


def test_a_run_goes_on_where_its_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    found = filled()
    found.results[1] = Result(
        mode="auto",
        category="a",
        question_id="0",
        unit=0,
        turn=0,
        stats=with_drafts(3, 0),
        diverged=True,
        near_tie=True,
    )
    found.left_out, found.setup_s = {2}, {"auto": 1.5}
    found.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    again = filled()
    again.results = []
    again.resume(path)
    assert again.done == {0, 1, 2}
    assert again.results == found.results
    assert again.as_dict()["modes"] == found.as_dict()["modes"]


def test_without_a_file_a_run_begins(tmp_path: Path) -> None:
    found = report()
    found.resume(tmp_path / "none.json")
    assert found.done == set()


def test_the_file_of_another_run_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    report().save(path)
    with pytest.raises(SwiftError, match="n_predict: 8 there, 9 here"):
        report(settings={"model": "m", "n_predict": 9}).resume(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 3}', "\udcff"])
def test_what_is_no_report_is_said(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SwiftError, match="not a report"):
        report().resume(path)


def test_the_table() -> None:
    text = render(filled())
    lines = text.splitlines()
    assert lines[0].split()[-3:] == ["best", "fixed", "setting"]
    assert "3.2 1.60x" in next(line for line in lines if line.startswith("a "))
    assert "ngram:4 2.00x, auto has 80%" in text
    whole = [
        line.split() for line in lines[lines.index("") :] if line.startswith(("plain", "auto"))
    ]
    assert whole[0][:2] == ["plain", "1.00"]
    assert whole[1][0] == "auto"
    assert whole[1][-1].endswith("x")
    assert "1 of 3 rows are not measured yet" in text
    assert "every answer of ours is plain decoding's" in text
    assert render(report()) == "nothing was measured"


def test_the_table_tells_our_answers_from_other_programs() -> None:
    found = filled()
    found.results.append(result("plain", 2, 9, 1.0))
    found.results.append(result("prompt-lookup", 2, 9, 1.0, diverged=True))
    text = render(found)
    assert "every answer of ours is plain decoding's" in text
    assert "1 answers of other programs differ" in text
    found.results.append(result("auto", 2, 9, 1.0, diverged=True))
    assert "1 answers differ from plain decoding's" in render(found)


def test_the_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(filled(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


# -- rows ------------------------------------------------------------------------------------------


def test_code_editing_rows_hold_a_whole_file() -> None:
    rows = load([CODE_EDITING])
    assert len({row.turns for row in rows}) == len(rows) >= 12
    for row in rows:
        (turn,) = row.turns
        assert row.category == CODE_EDITING
        assert "Print the whole file, nothing else.\n\n```" in turn
        assert 30 <= turn.count("\n") <= 90


def test_a_limit_is_spread_over_categories() -> None:
    rows = load([EVERYDAY, CODE_EDITING], limit=5)
    assert sorted(row.category for row in rows).count(EVERYDAY) in (2, 3)
    assert load([EVERYDAY, CODE_EDITING], limit=5) == rows
    only = load([EVERYDAY, CODE_EDITING], categories=[CODE_EDITING])
    assert {row.category for row in only} == {CODE_EDITING}
    with pytest.raises(SuiteError, match="there are code-editing, everyday"):
        load([EVERYDAY, CODE_EDITING], categories=["poems"])


def rows(**counts: int) -> list[Row]:
    return [
        Row(category=name, question_id=f"{name}{i}", turns=("?",))
        for name, n in counts.items()
        for i in range(n)
    ]


@given(st.integers(1, 12), st.integers(0, 5))
def test_categories_come_equally_often(n: int, seed: int) -> None:
    picked = pick(rows(a=10, b=10, c=10), n, seed=seed)
    counts = Counter(row.category for row in picked)
    assert len({row.question_id for row in picked}) == n
    assert max(counts.values()) - min(counts.get(name, 0) for name in "abc") <= 1


def test_a_small_category_does_not_end_the_others() -> None:
    assert Counter(row.category for row in pick(rows(a=1, b=9), 6, seed=0)) == {"a": 1, "b": 5}


def test_the_seed_decides_which() -> None:
    suite = rows(a=20, b=20)
    assert pick(suite, 6, seed=1) == pick(suite, 6, seed=1) != pick(suite, 6, seed=2)


# -- ties ------------------------------------------------------------------------------------------


class Logits:
    """A model of three tokens, the last an end of generation, whose logits of the others are
    `noise` apart from their values where `width` tokens or more are decoded at once."""

    n_vocab = 3
    rollback_refusal = None

    def __init__(self, values: Sequence[float], *, noise: float, width: int = 2) -> None:
        self._values = np.array(values, dtype=np.float32)
        self._noise = np.array([noise, -noise, 0.0], dtype=np.float32)
        self._noisy_width = width
        self.tokens: list[int] = []
        self._width = 0

    def clear(self) -> None:
        self.tokens.clear()

    def rollback(self, n_past: int) -> None:
        assert n_past <= len(self.tokens)
        del self.tokens[n_past:]

    def decode(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        assert len(tokens) > 0
        self.tokens += tokens
        self._width = n_outputs

    def logits(self, row: int) -> Any:
        assert row == self._width - 1
        return self._values + self._noise * (self._width >= self._noisy_width)

    def is_eog(self, token: int) -> bool:
        return token == 2


@pytest.mark.parametrize(("gap", "near"), [(0.19, True), (0.21, False)])
def test_a_tie_is_near_within_the_noise_of_both_logits(gap: float, near: bool) -> None:
    model: Any = Logits([5.0 + gap, 5.0, 0.0], noise=0.1)
    found = explain(model, [1] * 20, [1, 0, 0], [1, 1])
    assert found.position == 1
    assert found.gap == pytest.approx(gap, abs=1e-5)
    assert found.noise == pytest.approx(0.1, abs=1e-5)
    assert found.is_near_tie == near
    assert len(model.tokens) == 21


def test_an_answer_that_ended_chose_the_end() -> None:
    model: Any = Logits([5.0, 1.0, 4.0], noise=0.0)
    assert explain(model, [1], [0], [0, 0]).gap == 1.0
    assert not explain(model, [1], [0], [0, 0]).is_near_tie
    with pytest.raises(ValueError, match="the same"):
        explain(model, [1], [0], [0])


def test_invariance_is_measured() -> None:
    exact: Any = Logits([1.0, 2.0, 3.0], noise=0.0)
    assert is_bit_invariant(exact)
    assert exact.tokens == []
    noisy: Any = Logits([1.0, 2.0, 3.0], noise=1e-6, width=9)
    assert not is_bit_invariant(noisy)
    noisy.rollback_refusal = "it is recurrent"
    assert is_bit_invariant(noisy)
