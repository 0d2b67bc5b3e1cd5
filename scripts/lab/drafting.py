"""What each way of drafting brings on one sub-network.

Every prompt is answered in all modes in turn, in an order that rotates, so that a slow spell of the
machine hits all alike; speed is compared by prompt.  The prompt itself is decoded once for all.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lab import corpus
from lab.cold import Cold, measure_cold
from lab.command import finish, positive, suite_options, suite_parser, tell
from lab.corpus import Progress, Prompt, decode, hold
from lab.output import layers, markdown
from swift_gguf.bench.spread import Spread
from swift_gguf.bench.subject import Machine, Subject, machine, subject
from swift_gguf.errors import ModelError, UnsupportedModelError
from swift_gguf.gguf.identity import fingerprint
from swift_gguf.hub import models
from swift_gguf.learning import Store
from swift_gguf.model import Model
from swift_gguf.outputs import panels
from swift_gguf.speculation import Speculation, SpeculationOptions
from swift_gguf.stats import Stats
from swift_gguf.subnetwork import SubNetwork, parse_layers

PLAIN = "plain"
FIXED = 4
"""Tokens of the chain that never stops early."""
P_MIN = 0.8
"""SWIFT's threshold (§4.2)."""


# -- values ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """One answer in one mode; times are seconds, prefill is in none of them."""

    mode: str
    prompt: int
    round: int
    tokens: int
    """Tokens that the cycles produce; the first token comes from the prompt's pass."""
    cycle_s: float
    draft_s: float
    verify_s: float
    cycles: int
    cycle_n: int
    drafted: int
    accepted: int
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A mode on all prompts that were answered both in it and plainly."""

    mode: str
    tokens_per_s: float
    """Total tokens per total second."""
    ratio: Spread | None
    """Speed-up over plain decoding, one value per prompt."""
    total_ratio: float
    """Speed-up over plain decoding, from total tokens per total second."""
    acceptance: float
    """Acceptance rate; at most one of a tree's sibling tokens can be accepted."""
    mean_length: float
    drafted_a_cycle: float
    diverged: int
    """Answers whose ids differ from plain decoding's."""
    answers: int


@dataclass(kw_only=True)
class Report:
    """The results so far; an interrupted measurement keeps them."""

    machine: Machine | None = None
    subject: Subject | None = None
    subnetwork: SubNetwork | None = None
    prompts: list[Prompt] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    cold: Cold | None = None

    def begin(self, model: Model, prompts: Sequence[Prompt]) -> None:
        """Records the model, the machine and the prompts."""
        self.machine, self.subject = machine(), subject(model)
        self.prompts = list(prompts)

    def summaries(self) -> list[Summary]:
        """By mode, plain decoding first."""
        modes = dict.fromkeys([PLAIN, *(run.mode for run in self.runs)]) if self.runs else {}
        return [found for mode in modes if (found := summarize(mode, self.runs)) is not None]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types; the answers' ids are left out."""
        runs = [asdict(run) for run in self.runs]
        for run in runs:
            del run["ids"]
        return {
            "machine": asdict(self.machine) if self.machine else None,
            "subject": asdict(self.subject) if self.subject else None,
            "subnetwork": layers(self.subnetwork) if self.subnetwork else None,
            "prompts": [
                {
                    "category": prompt.category,
                    "question_id": prompt.question_id,
                    "prompt_n": len(prompt.tokens),
                }
                for prompt in self.prompts
            ],
            "modes": [asdict(summary) for summary in self.summaries()],
            "runs": runs,
            "cold": self.cold.as_dict() if self.cold else None,
        }


def summarize(mode: str, runs: Sequence[Run]) -> Summary | None:
    """Of the answers that were given in both modes, and are no single token; None without any."""
    plain = {(run.prompt, run.round): run for run in runs if run.mode == PLAIN}
    pairs = [
        (run, reference)
        for run in runs
        if run.mode == mode
        and run.cycles
        and (reference := plain.get((run.prompt, run.round))) is not None
        and reference.cycles
    ]
    if not pairs:
        return None
    ours, theirs = ([pair[i] for pair in pairs] for i in range(2))
    by_prompt = [
        _speed([run for run in ours if run.prompt == prompt])
        / _speed([run for run in theirs if run.prompt == prompt])
        for prompt in dict.fromkeys(run.prompt for run in ours)
    ]
    cycles, drafted = sum(run.cycles for run in ours), sum(run.drafted for run in ours)
    return Summary(
        mode=mode,
        tokens_per_s=_speed(ours),
        ratio=Spread.of(by_prompt) if mode != PLAIN else None,
        total_ratio=_speed(ours) / _speed(theirs),
        acceptance=sum(run.accepted for run in ours) / drafted if drafted else 0.0,
        mean_length=sum(run.cycle_n for run in ours) / cycles,
        drafted_a_cycle=drafted / cycles,
        diverged=sum(run.ids != reference.ids for run, reference in pairs),
        answers=len(pairs),
    )


def _speed(runs: Sequence[Run]) -> float:
    return sum(run.tokens for run in runs) / sum(run.cycle_s for run in runs)


# -- the measurement -------------------------------------------------------------------------------


def modes(draft_max: int) -> dict[str, SpeculationOptions]:
    """What is compared with plain decoding, by name; the sub-network is still to be named.

    draft_max: tokens of a draft at most, but for the fixed chain.
    """
    return {
        f"chain of {FIXED}": SpeculationOptions(draft_max=FIXED, p_min=0.0),
        f"chain, stop below {P_MIN}": SpeculationOptions(draft_max=draft_max, p_min=P_MIN),
        "chain, adaptive": SpeculationOptions(draft_max=draft_max, tree="chain"),
        f"caterpillar, stop below {P_MIN}": SpeculationOptions(
            draft_max=draft_max, p_min=P_MIN, tree="caterpillar"
        ),
        "best-first, adaptive": SpeculationOptions(draft_max=draft_max, tree="best-first"),
    }


def known_subnetwork(model: Model, store: Store | None = None) -> SubNetwork:
    """The best that the profile of a model knows.

    Raises:
        ModelError: it knows none.
    """
    profile = (store or Store()).load(fingerprint(model.path))
    if profile is None or not profile.known or profile.n_layer != model.n_layer:
        raise ModelError(
            f"no sub-network is known for {model.path}; run swift-gguf tune first, or name one "
            "with --skip-attn and --skip-ffn"
        )
    return profile.known[0].subnetwork


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    report: Report,
    *,
    subnetwork: SubNetwork,
    tokens: int,
    rounds: int = 1,
    draft_max: int = 8,
    store: Store | None = None,
    progress: Progress,
) -> None:
    """Fills a report that was begun with answers of at most `tokens` tokens.

    Leaves the context empty.
    The model is loaded with `corpus.context_size` of these prompts.
    store: where costs of passes are looked up; what is not there is measured.

    Raises:
        UnsupportedModelError: the model cannot be rolled back.
        SubnetworkError: the sub-network cannot be skipped.
    """
    report.subnetwork = subnetwork
    contenders: list[tuple[str, Speculation | None]] = [(PLAIN, None)]
    for name, options in modes(draft_max).items():
        contenders.append((name, _by_hand(model, subnetwork, options, store)))
    turn = 0
    try:
        for number in range(rounds):
            for i, prompt in enumerate(prompts):
                hold(model, prompt.tokens)
                first = turn % len(contenders)
                for mode, speculation in contenders[first:] + contenders[:first]:
                    stats, ids = decode(model, prompt, speculation, tokens)
                    report.runs.append(_run(mode, i, number, stats, ids))
                turn += 1
                progress(_line(f"prompt {i + 1} of {len(prompts)}, round {number + 1}", report))
    finally:
        model.clear()


def _by_hand(
    model: Model, subnetwork: SubNetwork, options: SpeculationOptions, store: Store | None
) -> Speculation:
    """Drafts as the product does, on this sub-network only."""
    named = SpeculationOptions(
        mode="layer-skip",
        skip_attn=subnetwork.skip_attn,
        skip_ffn=subnetwork.skip_ffn,
        search="off",
        draft_max=options.draft_max,
        p_min=options.p_min,
        tree=options.tree,
    )
    speculation = Speculation(model, named, store=store)
    if speculation.drafter is None:
        raise UnsupportedModelError(f"nothing to compare: {speculation.why}")
    if speculation.learning and speculation.learning.costs.is_provisional:
        speculation.learning.measure_costs()
    return speculation


def _run(mode: str, prompt: int, number: int, stats: Stats, ids: tuple[int, ...]) -> Run:
    return Run(
        mode=mode,
        prompt=prompt,
        round=number,
        tokens=max(0, stats.predicted_n - 1),
        cycle_s=stats.cycle_s,
        draft_s=stats.draft_s,
        verify_s=stats.verify_s,
        cycles=stats.cycles,
        cycle_n=stats.cycle_n,
        drafted=stats.drafted,
        accepted=stats.accepted,
        ids=ids,
    )


# -- to read ---------------------------------------------------------------------------------------


def _line(what: str, report: Report) -> str:
    ratios = [f"{s.mode} {s.total_ratio:.2f}" for s in report.summaries() if s.ratio]
    return f"{what}: {', '.join(ratios)}"


def render(report: Report) -> str:
    """Markdown."""
    return "\n\n".join(_sections(report))


def _sections(report: Report) -> Iterator[str]:
    where, what = report.machine, report.subject
    if what and where:
        yield (
            f"{what.name}, {what.description}, {what.n_threads} threads on {what.device} "
            f"({where.cpu}, load before {where.load:.1f}); {len(report.prompts)} prompts"
        )
    if summaries := report.summaries():
        yield f"Drafts {report.subnetwork}; speed against plain decoding: median (quartiles)"
        yield markdown(
            ["mode", "by prompt", "in all", "tok/s", "accepted", "length", "drafted", "diverged"],
            (_row(summary) for summary in summaries),
        )
    if report.cold:
        yield report.cold.line()


def _row(summary: Summary) -> list[str]:
    return [
        summary.mode,
        summary.ratio.text() if summary.ratio else "1",
        f"{summary.total_ratio:.2f}",
        f"{summary.tokens_per_s:.1f}",
        f"{summary.acceptance:.0%}",
        f"{summary.mean_length:.2f}",
        f"{summary.drafted_a_cycle:.2f}",
        f"{summary.diverged} of {summary.answers}",
    ]


def plot(report: Report, path: Path) -> None:
    """Speed against plain decoding by mode: median and quartiles over prompts."""
    figure, (panel,) = panels(1)
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


# -- the command -----------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    parser = suite_parser("drafting", __doc__, prompts=10, tokens=96)
    parser.add_argument("--rounds", type=positive, default=1, metavar="N")
    parser.add_argument("--draft-max", type=positive, default=8, metavar="N")
    parser.add_argument(
        "--skip-attn", type=parse_layers, metavar="LAYERS", help="instead of the profile's"
    )
    parser.add_argument("--skip-ffn", type=parse_layers, metavar="LAYERS", help="likewise")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="instead: what the search costs where nothing is known yet",
    )
    args = parser.parse_args(arguments)
    if args.cold and args.plot:
        parser.error("--cold has nothing to plot")
    report = Report()
    return finish(args, report, run=lambda: _fill(args, report), plot=plot, render=render)


def _fill(args: argparse.Namespace, report: Report) -> None:
    with Model(models.resolve(args.model), suite_options(args)) as model:
        chosen = corpus.prompts(
            model, args.suite, args.prompts, longest=args.max_prompt, seed=args.seed
        )
        report.begin(model, chosen)
        common = {"tokens": args.tokens, "draft_max": args.draft_max, "progress": tell}
        if args.cold:
            report.cold = Cold()
            measure_cold(model, chosen, report.cold, **common)
        else:
            measure(
                model,
                chosen,
                report,
                subnetwork=_subnetwork(model, args),
                rounds=args.rounds,
                **common,
            )


def _subnetwork(model: Model, args: argparse.Namespace) -> SubNetwork:
    if args.skip_attn is None and args.skip_ffn is None:
        return known_subnetwork(model)
    return SubNetwork(
        n_layer=model.n_layer,
        skip_attn=args.skip_attn or frozenset(),
        skip_ffn=args.skip_ffn or frozenset(),
    )
