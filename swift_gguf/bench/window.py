"""Drafts that look back on everything, and on the latest tokens: their costs, and how often right.

At several lengths of a text, position after position: the model's likeliest next token, and what
the same sub-network says with and without a window.  All passes of a position stand side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import Any

from swift_gguf.bench.corpus import Progress
from swift_gguf.bench.mechanism import subject
from swift_gguf.bench.output import markdown
from swift_gguf.bench.report import Subject
from swift_gguf.bench.spread import Machine, Spread, machine
from swift_gguf.errors import SwiftError
from swift_gguf.model import Model
from swift_gguf.subnetwork import DRAFT_WINDOW, SubNetwork

WHOLE, ALL, WINDOW = "the whole model", "a draft", f"a draft that sees {DRAFT_WINDOW} tokens"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way at one length."""

    pass_ms: Spread
    agreement: float
    """Share of positions where its likeliest token is the whole model's."""


@dataclass
class Report:
    """Filled as measurements come in."""

    subject: Subject | None = None
    machine: Machine | None = None
    draft: str = ""
    positions: int = 0
    """At each length."""
    lengths: dict[int, dict[str, Point]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def draft_of(model: Model) -> SubNetwork:
    """With a sidecar all it narrows, else SWIFT's start."""
    sidecar = model.usable_sidecar()
    if sidecar is None:
        return SubNetwork.uniform(model.n_layer)
    return SubNetwork(
        n_layer=model.n_layer, narrow_ffn=sidecar.narrow_layers, draft_head=sidecar.n_head > 0
    )


def measure(
    model: Model,
    text: Sequence[int],
    report: Report,
    *,
    lengths: Sequence[int],
    positions: int,
    progress: Progress = lambda line: None,
) -> None:
    """Fills the report.

    text: tokens, of which the first ones are decoded at each length.

    Raises:
        SwiftError: the text is too short.
    """
    needed = max(lengths) + positions
    if len(text) < needed:
        raise SwiftError(
            f"a text of {len(text)} tokens where {needed} are needed; give a longer one"
        )
    draft = draft_of(model)
    report.subject, report.machine = subject(model), machine()
    report.draft, report.positions = str(draft), positions
    ways = {WHOLE: None, ALL: draft, WINDOW: replace(draft, window=DRAFT_WINDOW)}
    model.clear()
    for length in sorted(lengths):
        model.decode(text[model.n_past : length], exact=False)
        report.lengths[length] = _points(model, text[length : length + positions], ways)
        model.rollback(length)
        progress(f"{length} tokens measured")


def _points(
    model: Model, tokens: Sequence[int], ways: dict[str, SubNetwork | None]
) -> dict[str, Point]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    agrees = dict.fromkeys(ways, 0)
    for token in tokens:
        expected = None
        for name, subnetwork in ways.items():
            for _ in range(2):  # drafts follow their like, on the same graph
                start = perf_counter()
                model.decode_tree([token], [-1], subnetwork=subnetwork)
                (likeliest,), _ = model.top(0)
                taken = perf_counter() - start
                model.rollback(model.n_past)
            seconds[name].append(taken)
            expected = likeliest if expected is None else expected
            agrees[name] += likeliest == expected
        model.decode([token])
    return {
        name: Point(
            pass_ms=Spread.of(1e3 * value for value in seconds[name]),
            agreement=agrees[name] / len(tokens),
        )
        for name in ways
    }


def render(report: Report) -> str:
    """The report as a table in Markdown; empty if nothing was measured."""
    if report.subject is None or not report.lengths:
        return ""
    rows = []
    for length, points in report.lengths.items():
        whole = points[WHOLE].pass_ms
        for name, point in points.items():
            share = point.pass_ms.median / whole.median
            agreement = "" if name == WHOLE else f"{point.agreement:.3f}"
            rows.append((str(length), name, point.pass_ms.text(), f"{share:.2f}", agreement))
    title = (
        f"{report.subject.description}, drafts: {report.draft}; "
        f"{report.positions} positions at each length"
    )
    return f"{title}\n\n{markdown(['tokens', 'pass', 'ms', 'share', 'agreement'], rows)}"
