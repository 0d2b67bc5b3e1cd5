"""Benchmarks: statistics, tables, the report's JSON, synthetic models; nothing is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from swift_gguf.bench.reference import LogitsComparison, ReferenceReport, verdict
from swift_gguf.bench.reference import render as render_reference
from swift_gguf.bench.report import (
    DraftTime,
    EngineTime,
    PartTime,
    PassTime,
    Report,
    Subject,
    SwitchTime,
    render,
)
from swift_gguf.bench.spread import Machine, Spread, machine, table

ROOT = Path(__file__).resolve().parents[3]


def spread(median: float) -> Spread:
    return Spread.of([median - 1, median, median + 1])


def report(**changes: object) -> Report:
    values: dict[str, object] = {
        "machine": Machine(cpu="Some CPU", cores=2, system="Linux x86_64", load=0.1),
        "subject": Subject(
            name="model.gguf",
            description="llama 7B Q4_0",
            n_bytes=4_000_000_000,
            n_layer=32,
            n_threads=2,
            device="Some GPU",
            llama_commit="0123456789abcdef",
        ),
        "context": 128,
        "rounds": 3,
        "repeats": 2,
        "passes": (
            PassTime(width=1, rows=1, ms=spread(50)),
            PassTime(width=4, rows=4, ms=spread(150)),
            PassTime(width=4, rows=1, ms=spread(100)),
        ),
        "drafts": (
            DraftTime(
                name="all FFNs",
                subnetwork="without FFN 0-31",
                ms=spread(25),
                byte_share=0.4,
                ratio=Spread.of([1.25]),
            ),
        ),
        "parts": (
            PartTime(name="FFN", ms=25.0, n_bytes=100_000_000),
            PartTime(name="full pass", ms=50.0, n_bytes=400_000_000),
        ),
        "switches": (SwitchTime(width=4, extra_ms=spread(2), floor_ms=0.5),),
        "engine": (
            EngineTime(
                mode="layer-skip",
                cycles=60,
                cycle_ms=80.0,
                overhead_us=spread(20),
                overhead_share=Spread.of([0.01]),
                outside_us=spread(90),
                outside_share=Spread.of([0.02]),
            ),
        ),
    }
    return Report(**{**values, **changes})  # type: ignore[arg-type]


def test_spread_is_median_and_quartiles() -> None:
    found = Spread.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found.min, found.q1, found.median, found.q3, found.n) == (1.0, 2.0, 3.0, 4.0, 5)


def test_spread_does_not_move_with_one_interrupted_pass() -> None:
    assert Spread.of([10.0] * 9 + [5000.0]).median == 10.0


def test_spread_of_one_value_and_of_none() -> None:
    only = Spread.of([7.0])
    assert only.q1 == only.median == only.q3 == 7.0
    with pytest.raises(ValueError, match="at least one round"):
        Spread.of([])


def test_spread_text() -> None:
    assert Spread.of([1.0, 2.0, 3.0]).text() == "2.00 (1.50-2.50)"
    assert Spread.of([1.0, 2.0, 3.0]).text(0) == "2 (2-2)"


def test_table_aligns_columns() -> None:
    lines = table(["name", "ms"], [["a", "1.00"], ["longer", "10.00"]]).splitlines()
    assert lines == ["name       ms", "-------------", "a        1.00", "longer  10.00"]


def test_machine_is_named() -> None:
    here = machine()
    assert here.cpu
    assert here.cores >= 1


def test_report_is_json() -> None:
    found = json.loads(json.dumps(report().as_dict()))
    assert found["subject"]["llama_commit"] == "0123456789abcdef"
    assert found["passes"][1] == {
        "width": 4,
        "rows": 4,
        "ms": {"median": 150.0, "q1": 149.5, "q3": 150.5, "min": 149.0, "n": 3},
    }
    assert found["parts"][0]["gb_per_s"] == 4.0
    assert set(found) == {
        "machine",
        "subject",
        "context",
        "rounds",
        "repeats",
        "passes",
        "drafts",
        "parts",
        "switches",
        "engine",
    }


def test_rendered_report_has_every_figure() -> None:
    text = render(report())
    for part in ("Some CPU", "Some GPU", "012345678;", "150.00", "3.00", "1.250", "0.400", "0.500"):
        assert part in text
    (widths,) = [line for line in text.splitlines() if line.startswith("4  ")]
    assert widths.split()[3] == "3.00", "relative to one token"


def test_report_of_a_model_that_cannot_skip_is_rendered() -> None:
    text = render(report(drafts=(), parts=(), switches=(), engine=()))
    assert "full pass" in text
    assert "draft" not in text


def test_a_part_lost_in_the_noise_has_no_rate() -> None:
    assert PartTime(name="head", ms=-0.1, n_bytes=1000).gb_per_s == 0.0


@pytest.mark.parametrize(
    ("comparison", "identical"),
    [
        (LogitsComparison(n_rows=2, different=()), True),
        (LogitsComparison(n_rows=2, different=("single 1",)), False),
        (LogitsComparison(n_rows=0, different=()), False),  # nothing compared proves nothing
    ],
)
def test_logits_comparison(comparison: LogitsComparison, identical: bool) -> None:
    assert comparison.identical is identical


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([0.995, 1.0, 1.005], "yes"),
        ([0.90, 0.95, 0.97], "no"),
        ([1.05, 1.06, 1.07], "no"),
        ([0.90, 1.0, 1.10], "too noisy to say"),
    ],
)
def test_verdict_of_a_ratio(ratios: list[float], expected: str) -> None:
    assert verdict(Spread.of(ratios), 0.01) == expected


def test_reference_report_is_rendered() -> None:
    one = Spread.of([1.0])
    text = render_reference(
        ReferenceReport(
            model="model.gguf",
            n_threads=2,
            rounds=1,
            decode_reference=spread(10),
            decode_patched=spread(11),
            prefill_reference=one,
            prefill_patched=one,
            decode_ratio=Spread.of([1.1]),
            prefill_ratio=one,
            logits=LogitsComparison(n_rows=3, different=("single 1",)),
        )
    )
    assert "1.1000" in text
    assert "2 of 3 rows of logits are bit-identical" in text
    assert "different: single 1" in text


@pytest.mark.parametrize(("type_name", "n_bytes"), [("q4_0", 18), ("q8_0", 34)])
def test_synthetic_model_is_valid_and_balanced(
    tmp_path: Path, type_name: str, n_bytes: int
) -> None:
    path = tmp_path / "synthetic.gguf"
    script = [sys.executable, str(ROOT / "scripts" / "make_synthetic.py"), str(path)]
    subprocess.run([*script, "--shape", "tiny", "--type", type_name], check=True)
    assert [file.name for file in tmp_path.iterdir()] == ["synthetic.gguf"]

    weights = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    query = weights["blk.0.attn_q.weight"]
    assert query.n_bytes == 256 * 256 // 32 * n_bytes
    values = gguf.quants.dequantize(query.data, query.tensor_type)
    assert values.shape == (256, 256)
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(256**-0.5, rel=0.1)
    assert abs(values.mean()) < 0.1 * values.std()
