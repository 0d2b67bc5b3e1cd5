"""Figures of measurements, as PNG or SVG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_gguf.bench.search_report import BY_COST
from swift_gguf.bench.search_report import Report as SearchReport
from swift_gguf.errors import SwiftError
from swift_gguf.subnetwork import SubNetwork

if TYPE_CHECKING:
    from swift_gguf.bench.drafting import Report as DraftingReport
    from swift_gguf.bench.front import Report as FrontReport
    from swift_gguf.planning.cost import Costs

DPI = 150


def require_matplotlib() -> None:
    """To be called before a long measurement.

    Raises:
        SwiftError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SwiftError("a plot needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")  # a file needs no display


def _panels(n: int) -> tuple[Any, list[Any]]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0 * n, 4.5), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, n, squeeze=False)[0]
    for panel in axes:
        panel.grid(alpha=0.3)
    return figure, list(axes)


def plot_front(report: FrontReport, path: Path) -> None:
    """Agreement by the cost of a pass, skipping and narrowing apart."""
    figure, (panel,) = _panels(1)
    for label, uses_sidecar in (("sub-layers left out", False), ("narrow, draft head", True)):
        points = [p for p in report.points.values() if p.uses_sidecar == uses_sidecar]
        costs, agreements = [p.cost for p in points], [p.agreement for p in points]
        panel.plot(costs, agreements, "D" if uses_sidecar else "s", label=label)
    for name, point in report.points.items():
        panel.annotate(name, (point.cost, point.agreement), fontsize="xx-small")
    panel.set(xlabel="draft pass / full pass, time", ylabel="agreement", xlim=(0, 1), ylim=(0, 1))
    panel.legend(fontsize="small")
    figure.savefig(path)


def plot_search(report: SearchReport, path: Path) -> None:
    """Three panels: agreement by cost; by search time, speed where width is free, and agreement."""
    figure, (front, speed, matchness) = _panels(3)
    by_cost = [s for name, s in report.named.items() if name.startswith(BY_COST)]
    even = [
        s
        for name, s in report.named.items()
        if name not in report.runs and not name.startswith(BY_COST)
    ]
    _front(front, report, "even patterns", even, color="grey", marker="s")
    _front(front, report, "ours, best by cost", by_cost, color="C0", marker="o", fillstyle="none")
    for number, (method, points) in enumerate(report.runs.items()):
        last = [point.best for point in points[-1:]]
        _front(front, report, method, last, color=f"C{number}", marker="D")
    front.set(xlabel="draft pass / full pass, time", ylabel="agreement on held-out text")
    for number, (method, points) in enumerate(report.runs.items()):
        scored = [point for point in points if point.best in report.scores]
        seconds = [point.seconds for point in scored]
        scores = [report.scores[point.best] for point in scored]
        for panel, values in (
            (speed, [score.free_width for score in scores]),
            (matchness, [score.agreement for score in scores]),
        ):
            panel.step(seconds, values, where="post", color=f"C{number}", label=method)
    speed.axhline(1.0, color="grey", linewidth=1)
    speed.set(xlabel="seconds of search", ylabel="speed-up on held-out text, width free")
    matchness.set(xlabel="seconds of search", ylabel="matchness on held-out text")
    for panel in (front, speed, matchness):
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small")
    figure.savefig(path)


def _front(
    panel: Any, report: SearchReport, label: str, subnetworks: Sequence[SubNetwork], **style: str
) -> None:
    scores = [report.scores[s] for s in subnetworks if s in report.scores]
    if not scores:
        return
    below = [max(0.0, score.agreement - score.low) for score in scores]
    above = [max(0.0, score.high - score.agreement) for score in scores]
    panel.errorbar(
        [score.pass_share for score in scores],
        [score.agreement for score in scores],
        yerr=[below, above],
        linestyle="none",
        capsize=2,
        label=label,
        **style,
    )


def plot_drafting(report: DraftingReport, path: Path) -> None:
    """Speed against plain decoding by mode: median and quartiles over prompts."""
    figure, (panel,) = _panels(1)
    rows = [summary for summary in report.summaries() if summary.ratio]
    for number, summary in enumerate(reversed(rows)):
        ratio = summary.ratio
        assert ratio is not None
        panel.errorbar(
            [ratio.median],
            [number],
            xerr=[[ratio.median - ratio.q1], [ratio.q3 - ratio.median]],
            fmt="o",
            color="C0",
            capsize=3,
        )
    panel.axvline(1.0, color="grey", linewidth=1)
    panel.set_yticks(range(len(rows)), [summary.mode for summary in reversed(rows)])
    panel.set(xlabel="tokens/s against plain, by prompt")
    figure.savefig(path)


def plot_costs(costs: Costs, path: Path) -> None:
    """Two panels: what a pass takes by its width, and a token of it."""
    figure, (whole, each) = _panels(2)
    widths = [width for width, _ in costs.pass_ms]
    whole.plot(widths, [ms for _, ms in costs.pass_ms], marker="o")
    each.plot(widths, [ms / width for width, ms in costs.pass_ms], marker="o")
    for panel, of in ((whole, "pass"), (each, "token")):
        panel.set_ylim(bottom=0)
        panel.set(xlabel="tokens in a pass", ylabel=f"ms a {of}")
    figure.savefig(path)
