"""Shows the report of `swift-gguf bench` as tables, notes and a figure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from swift_gguf.bench.modes import PLAIN, Mode
from swift_gguf.bench.spread import table
from swift_gguf.bench.suite_report import Limit, Report, Summary
from swift_gguf.outputs import DPI, require_matplotlib

ALL = "all"
NOTHING = "-"


def render(report: Report) -> str:
    """The report as plain text; also of an unfinished run."""
    return "\n\n".join(_sections(report))


def _sections(report: Report) -> Iterator[str]:
    if not report.results:
        yield "nothing was measured"
        return
    yield _by_category(report)
    yield _by_request(report)
    yield _by_mode(report)
    yield "\n".join([*_why(report), *_notes(report)])
    yield _machine(report)


def _shown(report: Report) -> list[Mode]:
    """The modes without those that only belong to the sweep."""
    return [mode for mode in report.modes if mode not in report.swept]


def _by_category(report: Report) -> str:
    modes = _shown(report)
    headers = ["tok/s, and times plain", *(mode.name for mode in modes)]
    has_limit = report.limit() is not None
    if has_limit:
        headers.append("best fixed setting")
    rows = []
    for category in (*report.categories, None):
        row = [ALL if category is None else category or "(none)"]
        row += [_speed(mode.name, report.summary(mode.name, category)) for mode in modes]
        if has_limit:
            row.append(_limit(report.limit(category)))
        rows.append(row)
    return table(headers, rows)


def _speed(mode: str, summary: Summary | None) -> str:
    if summary is None or summary.tokens_per_second is None:
        return NOTHING
    if mode == PLAIN:
        return f"{summary.tokens_per_second:.1f}"
    return f"{summary.tokens_per_second:.1f} {_times(summary.speedup)}"


def _limit(limit: Limit | None) -> str:
    if limit is None:
        return NOTHING
    share = f", auto has {limit.auto_share:.0%}" if limit.auto_share else ""
    return f"{limit.mode} {_times(limit.speedup)}{share}"


def _times(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}x"


def _by_request(report: Report) -> str:
    """Whole requests: what a person waits for."""
    headers = ["whole requests", "first token, s", "all requests, s", "times plain"]
    rows = []
    for mode in _shown(report):
        if summary := report.summary(mode.name):
            times = NOTHING if mode.name == PLAIN else _times(summary.end_to_end_speedup)
            first, whole = summary.first_token_s.text(), f"{summary.requests_s:.1f}"
            rows.append([mode.name, first, whole, times])
    return table(headers, rows)


def _by_mode(report: Report) -> str:
    headers = ["mode", "by request", "first", "accepted", "length", "diverged"]
    headers += ["draft s", "verify s", "search s", "other s"]
    rows = []
    for mode in report.modes:
        summary, first = report.summary(mode.name), report.first(mode.name)
        if summary is None:
            continue
        stats, spread = summary.stats, summary.speedup_by_request
        seconds = stats.speculation()["seconds"]
        rows.append(
            [
                mode.name,
                spread.text() if spread and mode.name != PLAIN else NOTHING,
                _times(first.speedup if first else None),
                f"{stats.acceptance_rate:.0%}" if stats.drafted else NOTHING,
                f"{stats.mean_acceptance_length:.2f}",
                f"{summary.diverged} of {summary.requests}",
                *(f"{seconds[name]:.1f}" for name in ("draft", "verify", "search", "other")),
            ]
        )
    return table(headers, rows)


def _why(report: Report) -> Iterator[str]:
    for mode in _shown(report):
        if not mode.is_peer and mode.name != PLAIN and mode.name in report.why:
            yield f"{mode.name}: {report.why[mode.name]}"


def _notes(report: Report) -> Iterator[str]:
    diverged, of_peers = (report.diverged(of_peers=each) for each in (False, True))
    ties = sum(result.near_tie is True for result in diverged)
    kind = "bit-invariant" if report.bit_invariant else "not bit-invariant"
    text = f"{len(diverged)} answers differ from plain decoding's"
    yield (
        f"{text}, {ties} at a near tie; the model is {kind} here"
        if diverged
        else (f"every answer of ours is plain decoding's; the model is {kind} here")
    )
    if of_peers:
        ties = sum(result.near_tie is True for result in of_peers)
        yield f"{len(of_peers)} answers of other programs differ from it, {ties} at a near tie"
    if (left := report.units - len(report.done)) > 0:
        yield f"{left} of {report.units} rows are not measured yet"
    if report.left_out:
        yield f"{len(report.left_out)} rows do not fit the context; use a larger --ctx-size"


def _machine(report: Report) -> str:
    subject, machine = report.subject, report.machine
    peak = report.peak_memory_bytes
    memory = f", peak memory {peak / 1e6:.0f} MB" if peak else ""
    return (
        f"{subject.name}, {subject.description}, {subject.n_threads} threads on {subject.device} "
        f"({machine.cpu}, load before {machine.load:.1f}){memory}"
    )


def plot(report: Report, path: Path) -> None:
    """Plots the speed-up over plain decoding: a group of bars per category, a bar per mode.

    Raises:
        SwiftError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    modes = [mode for mode in _shown(report) if mode.name != PLAIN]
    groups = [*reversed([*report.categories, None])]
    height = 0.8 / max(1, len(modes))
    size = (7.0, 1.5 + 0.25 * len(groups) * (len(modes) + 1))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panel = figure.subplots()
    for i, mode in enumerate(modes):
        summaries = [report.summary(mode.name, category) for category in groups]
        panel.barh(
            [group + 0.4 - (i + 0.5) * height for group in range(len(groups))],
            [summary.speedup or 0.0 if summary else 0.0 for summary in summaries],
            height=height,
            color=f"C{i}",
            label=mode.name,
        )
    panel.axvline(1.0, color="grey", linewidth=1)
    panel.set_yticks(range(len(groups)), [ALL if name is None else name for name in groups])
    panel.set(xlabel="tokens/s against plain", title=report.subject.name)
    if modes:
        figure.legend(fontsize="small", loc="outside right upper")
    panel.grid(axis="x", alpha=0.3)
    figure.savefig(path)
