"""The mechanism's measurement runs on a tiny model; nothing here looks at how long it took."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lab.mechanism import (
    ENGINE_TOKENS,
    SWITCH_WIDTHS,
    WIDTHS,
    context_size,
    measure,
    subnetworks,
)
from lab.mechanism_report import Report, render
from swift_gguf.errors import UnsupportedModelError
from swift_gguf.model import Model, ModelOptions
from tests.conftest import N_GPU_LAYERS
from tests.fixtures.tiny_gguf import write_tiny

CONTEXT = 32
ROUNDS = 2


def load(folder: Path, family: str) -> Model:
    path = write_tiny(folder / f"{family}.gguf", family)
    return Model(
        path, ModelOptions(n_ctx=context_size(CONTEXT), n_threads=1, n_gpu_layers=N_GPU_LAYERS)
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    lines: list[str] = []
    with load(tmp_path_factory.mktemp("bench"), "llama") as model:
        found = measure(model, rounds=ROUNDS, context=CONTEXT, repeats=1, progress=lines.append)
        assert model.tokens == [], "the context is left empty"
    assert lines == ["round 1 of 2", "round 2 of 2", "engine"]
    return found


def test_every_width_is_there_with_all_rows_and_one(report: Report) -> None:
    found = {(timed.width, timed.rows) for timed in report.passes}
    assert found == {(width, rows) for width in WIDTHS for rows in (1, width)}
    assert all(timed.ms.n == ROUNDS and timed.ms.min > 0 for timed in report.passes)


def test_drafts_read_less(report: Report) -> None:
    shares = {draft.name: draft.byte_share for draft in report.drafts}
    assert set(shares) == {
        "every 4th FFN",
        "every 2nd FFN",
        "every 2nd attention",
        "uniform, both",
        "all FFNs",
        "all attention",
        "everything",
    }
    assert 0 < shares["everything"] < shares["all FFNs"] < shares["every 2nd FFN"]
    assert shares["every 2nd FFN"] < shares["every 4th FFN"] < 1
    for draft in report.drafts:
        assert math.isfinite(draft.ratio.median)
        assert draft.ratio.n == ROUNDS


def test_parts_add_up(report: Report) -> None:
    *parts, whole = report.parts
    assert [part.name for part in parts] == ["FFN", "attention", "head", "rest", "interaction"]
    assert sum(part.ms for part in parts) == pytest.approx(whole.ms)
    assert sum(part.n_bytes for part in parts) == pytest.approx(whole.n_bytes, rel=0.01)


def test_switches_and_engine(report: Report) -> None:
    assert [switch.width for switch in report.switches] == list(SWITCH_WIDTHS)
    assert [run.mode for run in report.engine] == ["plain", "layer-skip"]
    for run in report.engine:
        assert 0 < run.cycles <= ROUNDS * (ENGINE_TOKENS - 1)
        assert 0 <= run.overhead_share.median <= run.outside_share.median < 1


def test_report_says_what_was_measured(report: Report) -> None:
    found = json.loads(json.dumps(report.as_dict()))
    assert found["subject"]["name"] == "llama.gguf"
    assert found["subject"]["n_threads"] == 1
    assert found["subject"]["device"]
    assert found["machine"]["cpu"]
    assert "llama.gguf" in render(report)


def test_only_what_can_be_skipped_is(tmp_path: Path) -> None:
    with load(tmp_path, "apertus") as model:  # its FFNs are not built by the shared helpers
        found = subnetworks(model)
    assert found.keys() == {"every 2nd attention", "uniform, both", "all attention", "everything"}
    assert not any(subnetwork.skip_ffn for subnetwork in found.values())


def test_a_model_without_rollback_is_refused(tmp_path: Path) -> None:
    with load(tmp_path, "mamba") as model, pytest.raises(UnsupportedModelError, match="nothing to"):
        measure(model, rounds=1, context=CONTEXT)


def test_a_context_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with load(tmp_path, "llama") as model, pytest.raises(UnsupportedModelError, match="context of"):
        measure(model, rounds=1, context=10_000)
