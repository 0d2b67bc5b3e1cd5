"""The front of drafts: what a pass costs against how often it is right, skipped or narrowed.

Agreement is the share of positions of the model's own greedy answers where the draft's likeliest
token is the text's next one, with the target's cache for what is before (`search.window`).  Passes
of one token are timed in turns, so that a slow spell of the machine hits all alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from lab import corpus
from lab.command import finish, positive, suite_options, suite_parser, tell
from lab.corpus import Document, Progress, Prompt, answer, hold, windows
from lab.output import markdown
from swift_gguf.bench.spread import Spread
from swift_gguf.bench.subject import Machine, Subject, machine, subject
from swift_gguf.hub import models
from swift_gguf.model import Model
from swift_gguf.outputs import panels
from swift_gguf.search.objective import Outcome
from swift_gguf.subnetwork import SubNetwork

CONFIDENT = 0.8
"""SWIFT's threshold (§4.2)."""
SKIPPED = (1 / 7, 2 / 7, 3 / 7, 1 / 2, 5 / 7)
"""Shares of FFNs to skip, evenly spread over the layers between the first and the last."""
TIMED_AT = 128
"""Tokens in the context while passes are timed."""
CHUNK = 32


@dataclass(frozen=True, kw_only=True)
class Point:
    """A draft on the front."""

    uses_sidecar: bool
    cost: float
    """Time of a one-token pass relative to the whole model's; both are medians."""
    agreement: float
    confident: float
    """Share of positions where the draft is confident."""
    confident_agreement: float | None
    """Agreement at these positions; None if there are none."""


@dataclass
class Report:
    """The results so far."""

    subject: Subject | None = None
    machine: Machine | None = None
    sidecar_bytes: int | None = None
    pass_ms: Spread | None = None
    """Of the whole model."""
    positions: int = 0
    points: dict[str, Point] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def drafts(model: Model) -> dict[str, SubNetwork]:
    """The sub-networks to compare; narrow ones only if there is a sidecar."""
    n = model.n_layer
    inner = range(1, n - 1)
    found: dict[str, SubNetwork] = {}
    for share in SKIPPED:
        skip = frozenset(_evenly(inner, round(share * n)))
        found[f"{len(skip)} of {n} FFNs left out"] = SubNetwork(n_layer=n, skip_ffn=skip)
    found["every second sub-layer left out (SWIFT's start)"] = SubNetwork.uniform(n)
    if model.sidecar is None:
        return found
    narrow, has_head = model.sidecar.narrow_layers, model.sidecar.n_head > 0
    found["narrow"] = SubNetwork(n_layer=n, narrow_ffn=narrow)
    if has_head:
        found["draft head alone"] = SubNetwork(n_layer=n, draft_head=True)
        found["narrow, draft head"] = SubNetwork(n_layer=n, narrow_ffn=narrow, draft_head=True)
    middle = range(n // 8, 2 * n // 3)
    for every in (4, 2):
        skip = frozenset(middle[::every])
        found[f"the same without {len(skip)} attentions"] = SubNetwork(
            n_layer=n, narrow_ffn=narrow, draft_head=has_head, skip_attn=skip
        )
    return found


def _evenly(layers: range, n: int) -> list[int]:
    """n of the layers, evenly spread."""
    return [layers[round(i)] for i in np.linspace(0, len(layers) - 1, min(n, len(layers)))]


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    report: Report,
    *,
    tokens: int,
    rounds: int,
    progress: Progress = lambda line: None,
) -> None:
    """Fills the report.

    tokens: of an answer, at most.
    rounds: of timed passes.
    """
    report.subject, report.machine = subject(model), machine()
    sidecar = model.usable_sidecar()
    report.sidecar_bytes = sidecar.path.stat().st_size if sidecar else None
    compared = drafts(model)
    seconds = _time(model, prompts[0], compared, rounds)
    whole = report.pass_ms = Spread.of(1e3 * value for value in seconds.pop(""))
    progress(f"a pass takes {whole.text()} ms")
    outcomes: dict[str, list[Outcome]] = {name: [] for name in compared}
    for number, prompt in enumerate(prompts, 1):
        document = answer(model, prompt, tokens)
        if len(document.answer) < 2:
            continue
        for name, outcome in _score(model, document, compared):
            outcomes[name].append(outcome)
        progress(f"{number} of {len(prompts)}: {prompt.category}, {len(document.answer)} tokens")
        for name, found in outcomes.items():
            cost = 1e3 * float(np.median(seconds[name])) / whole.median
            report.points[name] = _point(compared[name], cost, found)
        report.positions += len(document.answer)


def _time(
    model: Model, prompt: Prompt, compared: Mapping[str, SubNetwork], rounds: int
) -> dict[str, list[float]]:
    """Seconds of one-token passes by name; the empty name is the whole model."""
    hold(model, (list(prompt.tokens) * TIMED_AT)[:TIMED_AT])
    cases: dict[str, SubNetwork | None] = {"": None, **compared}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, subnetwork in cases.items():
            for is_counted in (False, True):  # drafts follow their like, on the same graph
                start = perf_counter()
                model.decode([prompt.tokens[-1]], subnetwork=subnetwork)
                model.top(0)
                if is_counted and number:
                    seconds[name].append(perf_counter() - start)
                model.rollback(TIMED_AT)
    return seconds


def _score(
    model: Model, document: Document, compared: Mapping[str, SubNetwork]
) -> Iterator[tuple[str, Outcome]]:
    hold(model, document.tokens)
    pieces = windows(model, document, CHUNK, own_past=False)
    for name, subnetwork in compared.items():
        for piece in pieces:
            yield name, piece.score(subnetwork)


def _point(subnetwork: SubNetwork, cost: float, outcomes: Sequence[Outcome]) -> Point:
    agrees = np.concatenate([outcome.agrees for outcome in outcomes])
    is_confident = np.concatenate([outcome.confidence for outcome in outcomes]) >= CONFIDENT
    return Point(
        uses_sidecar=bool(subnetwork.narrow_ffn) or subnetwork.draft_head,
        cost=cost,
        agreement=float(agrees.mean()),
        confident=float(is_confident.mean()),
        confident_agreement=float(agrees[is_confident].mean()) if is_confident.any() else None,
    )


def render(report: Report) -> str:
    """The report as a table in Markdown; empty if nothing was measured."""
    if report.subject is None or report.pass_ms is None:
        return ""
    rows = [
        (
            name,
            f"{point.cost:.2f}",
            f"{point.agreement:.3f}",
            "" if point.confident_agreement is None
            else f"{point.confident:.2f}: {point.confident_agreement:.3f}",
        )
        for name, point in report.points.items()
    ]  # fmt: skip
    headers = ["draft", "pass", "agreement", f"confidence >= {CONFIDENT} (share: agreement)"]
    size = f", sidecar {report.sidecar_bytes / 1e6:.0f} MB" if report.sidecar_bytes else ""
    title = (
        f"{report.subject.description}: {report.pass_ms.text()} ms a pass, "
        f"{report.positions} positions{size}"
    )
    return f"{title}\n\n{markdown(headers, rows)}"


def plot(report: Report, path: Path) -> None:
    """Plots agreement against the cost of a pass, separately for skipping and narrowing."""
    figure, (panel,) = panels(1)
    for label, uses_sidecar in (("sub-layers left out", False), ("narrow, draft head", True)):
        points = [p for p in report.points.values() if p.uses_sidecar == uses_sidecar]
        costs, agreements = [p.cost for p in points], [p.agreement for p in points]
        panel.plot(costs, agreements, "D" if uses_sidecar else "s", label=label)
    for name, point in report.points.items():
        panel.annotate(name, (point.cost, point.agreement), fontsize="xx-small")
    panel.set(xlabel="draft pass / full pass, time", ylabel="agreement", xlim=(0, 1), ylim=(0, 1))
    panel.legend(fontsize="small")
    figure.savefig(path)


def main(arguments: Sequence[str]) -> int:
    parser = suite_parser("front", __doc__, prompts=14, tokens=64, seed=1)
    parser.add_argument("--category", action="append", metavar="NAME", help="only these")
    parser.add_argument("--rounds", type=positive, default=15, metavar="N", help="of timed passes")
    args = parser.parse_args(arguments)
    report = Report()
    return finish(args, report, run=lambda: _run(args, report), plot=plot, render=render)


def _run(args: argparse.Namespace, report: Report) -> None:
    with Model(models.resolve(args.model), suite_options(args)) as model:
        chosen = corpus.prompts(
            model,
            args.suite,
            args.prompts,
            longest=args.max_prompt,
            seed=args.seed,
            categories=args.category,
        )
        measure(model, chosen, report, tokens=args.tokens, rounds=args.rounds, progress=tell)
