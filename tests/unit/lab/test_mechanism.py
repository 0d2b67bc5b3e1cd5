"""Reports of `lab mechanism` and `lab reference`: their JSON and tables; nothing is measured."""

from __future__ import annotations

import json

import pytest

from lab.mechanism_report import (
    DraftTime,
    EngineTime,
    PartTime,
    PassTime,
    Report,
    SwitchTime,
    render,
)
from lab.reference import LogitsComparison, ReferenceReport, verdict
from lab.reference import render as render_reference
from swift_gguf.bench.spread import Spread
from swift_gguf.bench.subject import Machine, Subject


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
