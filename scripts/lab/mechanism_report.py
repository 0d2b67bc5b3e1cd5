"""The report of `lab.mechanism`: values, JSON, and a table to read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from swift_gguf.bench.spread import Spread, table
from swift_gguf.bench.subject import Machine, Subject


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """A pass of the whole model."""

    width: int
    rows: int
    """Rows with logits, the last ones."""
    ms: Spread


@dataclass(frozen=True, kw_only=True)
class DraftTime:
    """A one-token pass of a sub-network, its graph reused."""

    name: str
    subnetwork: str
    ms: Spread
    byte_share: float
    """Bytes of weights and KV cache that it reads, relative to a full pass."""
    ratio: Spread
    """Measured time over full time x byte_share; 1: it saves as much time as bytes."""


@dataclass(frozen=True, kw_only=True)
class PartTime:
    """A part of a one-token pass: the difference between passes with and without it."""

    name: str
    ms: float
    n_bytes: int

    @property
    def gb_per_s(self) -> float:
        """Bytes per time; 0 if the difference is smaller than the noise."""
        return self.n_bytes / self.ms / 1e6 if self.ms > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class SwitchTime:
    """What a change of graph adds: one-token drafts and wide verifications in turn, against each
    repeated on its own."""

    width: int
    """Tokens of the verification."""
    extra_ms: Spread
    """Per switch, one value per round."""
    floor_ms: float
    """Per switch, from the fastest pass of each kind: what is left without any disturbance."""


@dataclass(frozen=True, kw_only=True)
class EngineTime:
    """`engine.generate`, greedy: the time in its cycles that is not spent in llama.cpp.

    Spreads have one value a run.
    """

    mode: str
    cycles: int
    cycle_ms: float
    overhead_us: Spread
    """A cycle: `Stats.overhead_s`, what the engine does between decoding, drafting and sampling."""
    overhead_share: Spread
    """Of the cycles' time."""
    outside_us: Spread
    """A cycle: everything outside the native calls, so also the Python around them in `Model`,
    `Sampler` and the drafter, which `Stats` counts as decoding, sampling and drafting."""
    outside_share: Spread


@dataclass(frozen=True, kw_only=True)
class Report:
    """All results of `measure`."""

    machine: Machine
    subject: Subject
    context: int
    rounds: int
    repeats: int
    passes: tuple[PassTime, ...]
    drafts: tuple[DraftTime, ...]
    parts: tuple[PartTime, ...]
    switches: tuple[SwitchTime, ...]
    engine: tuple[EngineTime, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; spreads are objects with median, q1, q3, min and n."""
        values = asdict(self)
        for part, value in zip(self.parts, values["parts"], strict=True):
            value["gb_per_s"] = part.gb_per_s
        return values


def render(report: Report) -> str:
    """The report as plain text, times in ms: median (quartiles)."""
    return "\n\n".join(_sections(report))


def _sections(report: Report) -> Iterator[str]:
    subject, machine = report.subject, report.machine
    yield (
        f"{subject.name}: {subject.description}, {subject.n_bytes / 1e6:.0f} MB, "
        f"{subject.n_layer} layers\n"
        f"on {subject.device}; CPU {machine.cpu}, {machine.cores} cores, "
        f"{subject.n_threads} threads, {machine.system}, load before {machine.load:.1f}\n"
        f"llama.cpp {subject.llama_commit[:9]}; context {report.context}, "
        f"{report.rounds} rounds of {report.repeats} passes; ms, median (quartiles)"
    )
    yield _passes(report)
    if report.drafts:
        yield table(
            ["draft pass, one token", "ms", "bytes", "time / (full x bytes)"],
            [
                [draft.name, draft.ms.text(), f"{draft.byte_share:.3f}", draft.ratio.text(3)]
                for draft in report.drafts
            ],
        )
        yield table(
            ["part of a full pass", "ms", "share", "MB", "GB/s"],
            [_part(part, report.parts[-1]) for part in report.parts],
        )
    if report.switches:
        yield table(
            [
                "graph switch: draft and verification of",
                "extra ms a switch",
                "of the fastest passes",
            ],
            [
                [f"{switch.width} tokens", switch.extra_ms.text(3), f"{switch.floor_ms:.3f}"]
                for switch in report.switches
            ],
        )
    if report.engine:
        yield table(
            ["engine", "cycles", "ms a cycle", "overhead us", "%", "outside llama.cpp us", "%"],
            [
                [
                    run.mode,
                    str(run.cycles),
                    f"{run.cycle_ms:.2f}",
                    run.overhead_us.text(0),
                    f"{100 * run.overhead_share.median:.2f}",
                    run.outside_us.text(0),
                    f"{100 * run.outside_share.median:.2f}",
                ]
                for run in report.engine
            ],
        )


def _passes(report: Report) -> str:
    times = {(timed.width, timed.rows): timed.ms for timed in report.passes}
    one = times[1, 1].median
    return table(
        ["full pass, tokens", "all rows with logits", "x one", "one row with logits", "x one"],
        [
            [
                str(width),
                times[width, width].text(),
                f"{times[width, width].median / one:.2f}",
                times[width, 1].text(),
                f"{times[width, 1].median / one:.2f}",
            ]
            for width in sorted({width for width, _ in times})
        ],
    )


def _part(part: PartTime, whole: PartTime) -> list[str]:
    return [
        part.name,
        f"{part.ms:.2f}",
        f"{part.ms / whole.ms:.1%}",
        f"{part.n_bytes / 1e6:.1f}",
        f"{part.gb_per_s:.2f}" if part.n_bytes else "",
    ]
