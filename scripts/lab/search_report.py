"""The report of `lab.search`: values, statistics, JSON, and tables to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lab.output import layers, markdown
from swift_gguf.bench.subject import Machine, Subject
from swift_gguf.outputs import panels
from swift_gguf.planning.cost import Costs
from swift_gguf.search.objective import Objective, Outcome
from swift_gguf.subnetwork import SubNetwork

BY_COST = "ours, cost"
"""Prefix of the names of our best sub-networks by cost."""
BLOCK = 32
"""Block size of the bootstrap, in positions; at most a quarter of all positions."""

_T = TypeVar("_T")


# -- values ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compare, and for how long."""

    tokens: int = 128
    """Maximum tokens per answer."""
    seconds: float = 120.0
    """Search time of each method."""
    ratios: tuple[float, ...] = (0.15, 0.3, 0.45)
    """The paper's r, the share of sub-layers to skip; each value is a method."""
    checkpoints: int = 20
    """Approximate number of records of a method's best; all texts occur equally often."""
    estimates: int = 8
    """Number of sub-networks that also make real drafts, to compare estimators."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The best sub-network of a method after some time."""

    seconds: float
    steps: int
    best: SubNetwork


@dataclass(frozen=True, kw_only=True)
class Score:
    """A sub-network on the held-out texts, the target's cache for the past."""

    pass_share: float
    """Time of a draft pass relative to a full pass."""
    agreement: float
    low: float
    high: float
    """95 % interval of the agreement, for more text of the same kinds."""
    value: float
    """What the search maximises, relative to plain decoding.  From 1 on, it is the speed-up; below
    1, it is the tokens gained per time added."""
    free_width: float
    """The speed-up where a pass over some tokens takes no longer than over one."""
    positions: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Two estimates for a sub-network, and the results of real drafts."""

    pass_share: float
    own_past: float
    """Matchness in windows of 32 (SWIFT, §4.1)."""
    target_past: float
    live_first: float
    """Share of the first tokens of drafts that were accepted."""
    live_judged: float
    """Accepted share of judged tokens; tokens after a rejected one are not judged."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """A document, without its tokens."""

    category: str
    question_id: str
    prompt_n: int
    answer_n: int
    held_out: bool


@dataclass(kw_only=True)
class Report:
    """The results so far; an interrupted measurement keeps them."""

    options: Options
    machine: Machine | None = None
    subject: Subject | None = None
    texts: list[Text] = field(default_factory=list)
    costs: Costs | None = None
    runs: dict[str, list[Checkpoint]] = field(default_factory=dict)
    """By method."""
    named: dict[str, SubNetwork] = field(default_factory=dict)
    """The sub-networks of the table by name."""
    scores: dict[SubNetwork, Score] = field(default_factory=dict)
    estimates: dict[SubNetwork, Estimate] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "options": asdict(self.options),
            "machine": asdict(self.machine) if self.machine else None,
            "subject": asdict(self.subject) if self.subject else None,
            "texts": [asdict(text) for text in self.texts],
            "costs": self.costs.as_dict() if self.costs else None,
            "runs": {
                method: [
                    {"seconds": point.seconds, "steps": point.steps, **layers(point.best)}
                    for point in points
                ]
                for method, points in self.runs.items()
            },
            "named": {name: layers(subnetwork) for name, subnetwork in self.named.items()},
            "scores": [layers(s) | asdict(score) for s, score in self.scores.items()],
            "estimates": [layers(s) | asdict(value) for s, value in self.estimates.items()],
        }


# -- statistics ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FreeWidth:
    """The same draft passes on a machine where verifying several tokens takes as long as one, as is
    nearly so on most GPUs.  Where width is dear, all drafts lose, and their ranks say little."""

    costs: Costs

    def draft_ms(self, subnetwork: SubNetwork) -> float:
        """As measured."""
        return self.costs.draft_ms(subnetwork)

    def verify_ms(self, width: int) -> float:
        """As of one token."""
        return self.costs.verify_ms(1)


def pass_share(costs: Costs, subnetwork: SubNetwork) -> float:
    """Time of a draft pass relative to a full pass."""
    return costs.draft_ms(subnetwork) / costs.verify_ms(1)


def score(subnetwork: SubNetwork, outcomes: Sequence[Outcome], costs: Costs) -> Score:
    """Of outcomes on whole texts."""
    rate = Objective(costs=costs).rate(subnetwork, outcomes)
    free = Objective(costs=FreeWidth(costs)).rate(subnetwork, outcomes)
    low, high = interval(np.concatenate([outcome.agrees for outcome in outcomes]))
    return Score(
        pass_share=pass_share(costs, subnetwork),
        agreement=rate.agreement,
        low=low,
        high=high,
        value=rate.value * costs.verify_ms(1) / 1e3,
        free_width=free.speedup,
        positions=rate.positions,
    )


def interval(agrees: NDArray[np.bool_], *, draws: int = 2000) -> tuple[float, float]:
    """95 % of a share of dependent positions: circular block bootstrap (Politis & Romano 1992)."""
    n = len(agrees)
    block = max(1, min(BLOCK, n // 4))
    sums = np.cumsum(np.concatenate([[0], agrees, agrees[: block - 1]]))
    shares = (sums[block:] - sums[:-block]) / block  # of the block from each position on
    starts = np.random.default_rng(0).integers(n, size=(draws, -(-n // block)))
    low, high = np.quantile(shares[starts].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def varied(values: Mapping[_T, float], n: int) -> list[_T]:
    """At most n of the keys, their values as evenly over the whole range as there are any."""
    if not values:
        return []
    left = dict(values)
    targets = np.linspace(min(values.values()), max(values.values()), min(n, len(values)))
    chosen = []
    for target in targets:
        nearest = min(left, key=lambda key: abs(left[key] - target))
        chosen.append(nearest)
        del left[nearest]
    return chosen


def mean_error(estimates: Sequence[Estimate], estimator: str, live: str) -> float:
    """Mean absolute error of a field of `Estimate` against another one."""
    errors = [abs(getattr(item, estimator) - getattr(item, live)) for item in estimates]
    return float(sum(errors) / len(errors))


# -- to read ---------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """The report in Markdown; sections without results are left out."""
    return "\n\n".join(_sections(report))


def _sections(report: Report) -> Iterator[str]:
    subject, where, texts = report.subject, report.machine, report.texts
    if subject and where:
        held_out = sum(text.held_out for text in texts)
        yield (
            f"{subject.name}, {subject.description}, {subject.n_threads} threads on "
            f"{subject.device} ({where.cpu}, load before {where.load:.1f}); "
            f"{len(texts) - held_out} texts searched on, {held_out} held out; "
            f"{report.options.seconds:g} s of search for each method"
        )
    if report.scores:
        yield "### Sub-networks on held-out text"
        yield markdown(
            [
                "found by",
                "left out",
                "cost left",
                "agreement (95 %)",
                "value here",
                "speed-up, width free",
            ],
            (_front(name, s, report.scores[s]) for name, s in report.named.items()),
        )
        yield "### Held-out text by search time: speed-up where width is free, agreement"
        yield markdown(["seconds", *report.runs], _curves(report))
    if report.estimates:
        yield "### Estimators against real drafts"
        yield markdown(
            [
                "left out",
                "cost left",
                "own past (paper)",
                "target's past",
                "accepted, first tokens",
                "accepted, all judged",
            ],
            (_estimate(s, estimate) for s, estimate in report.estimates.items()),
        )
        yield markdown(["mean absolute error", "first tokens", "all judged"], _errors(report))


def _front(name: str, subnetwork: SubNetwork, score: Score) -> list[str]:
    agreement = f"{score.agreement:.3f} ({score.low:.3f}-{score.high:.3f})"
    return [
        name,
        _left_out(subnetwork),
        f"{score.pass_share:.2f}",
        agreement,
        f"{score.value:.3f}",
        f"{score.free_width:.3f}",
    ]


def _curves(report: Report) -> Iterator[list[str]]:
    for points in zip(*report.runs.values(), strict=False):  # interrupted, one may be longer
        scores = [report.scores[point.best] for point in points]
        yield [
            f"{points[0].seconds:.1f}",
            *(f"{score.free_width:.3f}, {score.agreement:.2f}" for score in scores),
        ]


def _estimate(subnetwork: SubNetwork, estimate: Estimate) -> list[str]:
    shares = (
        estimate.own_past,
        estimate.target_past,
        estimate.live_first,
        estimate.live_judged,
    )
    return [
        _left_out(subnetwork),
        f"{estimate.pass_share:.2f}",
        *(f"{share:.3f}" for share in shares),
    ]


def _errors(report: Report) -> Iterator[list[str]]:
    estimates = list(report.estimates.values())
    for name, estimator in (("own past (paper)", "own_past"), ("target's past", "target_past")):
        errors = (mean_error(estimates, estimator, f"live_{live}") for live in ("first", "judged"))
        yield [name, *(f"{error:.3f}" for error in errors)]


def _left_out(subnetwork: SubNetwork) -> str:
    return str(subnetwork).removeprefix("without ")


def plot(report: Report, path: Path) -> None:
    """Three panels: agreement by cost; by search time, speed where width is free, and agreement."""
    figure, (front, speed, matchness) = panels(3)
    by_cost = [s for name, s in report.named.items() if name.startswith(BY_COST)]
    even = [
        s
        for name, s in report.named.items()
        if name not in report.runs and not name.startswith(BY_COST)
    ]
    _mark(front, report, "even patterns", even, color="grey", marker="s")
    _mark(front, report, "ours, best by cost", by_cost, color="C0", marker="o", fillstyle="none")
    for number, (method, points) in enumerate(report.runs.items()):
        last = [point.best for point in points[-1:]]
        _mark(front, report, method, last, color=f"C{number}", marker="D")
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


def _mark(
    panel: Any, report: Report, label: str, subnetworks: Sequence[SubNetwork], **style: str
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
