"""Compares what searches find in the same time, and their estimates with real drafts.

Every method scores windows of the same texts in the same order, in slices of equal length; its
passes and its own thinking count, prefilling a text does not.  All methods work on one text before
the next is loaded, so that a slow spell of the machine hits all alike.  Afterwards everything that
any of them ever held best is scored on texts that none has seen.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from time import perf_counter

from lab import corpus
from lab.command import finish, suite_options, suite_parser, tell
from lab.corpus import Document, Progress, Prompt, answer, hold, windows
from lab.search_report import (
    BY_COST,
    Checkpoint,
    Estimate,
    FreeWidth,
    Options,
    Report,
    Text,
    pass_share,
    plot,
    render,
    score,
    varied,
)
from swift_gguf.bench.subject import machine, subject
from swift_gguf.drafting import LayerSkip, Tree
from swift_gguf.engine import generate
from swift_gguf.errors import SuiteError, UnsupportedModelError
from swift_gguf.hub import models
from swift_gguf.learning import space_of
from swift_gguf.model import Model
from swift_gguf.planning.cost import Costs
from swift_gguf.planning.measuring import measure as measure_costs
from swift_gguf.sampling import Sampler, SamplingOptions
from swift_gguf.search.objective import Objective, Outcome, Window
from swift_gguf.search.offline import STEPS
from swift_gguf.search.optimizer import Search, Searcher
from swift_gguf.search.paper import PaperOptions, PaperSearch
from swift_gguf.search.space import Space
from swift_gguf.subnetwork import SubNetwork

WINDOW = 32
COST_CONTEXT = 200
"""Tokens the context holds when costs are measured."""
LIVE_DRAFT_MAX = 4
BIN = 0.1
MIN_ANSWER = 8
"""Shorter answers are skipped."""

# -- the measurement -------------------------------------------------------------------------------


def measure(model: Model, prompts: Sequence[Prompt], report: Report, *, progress: Progress) -> None:
    """Fills the report; every second prompt is searched on, the others are held out.

    The model is loaded with `corpus.context_size` of these prompts.  Leaves its context empty.

    Raises:
        UnsupportedModelError: the model cannot be rolled back, or has nothing to skip.
        SuiteError: too few answers are long enough.
    """
    if refusal := model.rollback_refusal:
        raise UnsupportedModelError(f"nothing to measure: {refusal}; use another model")
    space = space_of(model)
    if space is None:
        raise UnsupportedModelError("nothing to measure: no sub-layer of this model can be skipped")
    report.machine, report.subject = machine(), subject(model)
    options = report.options
    try:
        searched, held_out = _documents(model, prompts, report, progress)
        progress("costs of passes")
        tokens = searched[0].tokens
        hold(model, (tokens * (COST_CONTEXT // len(tokens) + 1))[:COST_CONTEXT])
        costs = report.costs = measure_costs(model)

        methods = _methods(space, costs, options)
        report.runs = {method.name: method.checkpoints for method in methods}
        report.named = _patterns(space)
        _search(model, searched, methods, options, progress)
        report.named = (
            {method.name: method.checkpoints[-1].best for method in methods}
            | report.named
            | best_by_cost(methods[0].scored, costs)
        )
        _score(model, held_out, report, progress)
        _estimate(model, held_out, report, progress)
    finally:
        model.clear()


def _documents(
    model: Model, prompts: Sequence[Prompt], report: Report, progress: Progress
) -> tuple[list[Document], list[Document]]:
    """The documents to search on, and those held out."""
    parts: tuple[list[Document], list[Document]] = [], []
    for number, prompt in enumerate(prompts):
        document = answer(model, prompt, report.options.tokens)
        length = len(document.answer)
        progress(f"answer {number + 1} of {len(prompts)}: {prompt.category}, {length} tokens")
        if length < MIN_ANSWER:
            continue
        held_out = number % 2 == 1
        parts[held_out].append(document)
        report.texts.append(
            Text(
                category=prompt.category,
                question_id=prompt.question_id,
                prompt_n=len(prompt.tokens),
                answer_n=length,
                held_out=held_out,
            )
        )
    if not all(parts):
        raise SuiteError("too few answers of some length; ask for more with --prompts")
    return parts


def _patterns(space: Space) -> dict[str, SubNetwork]:
    """Sub-networks that one would try without a search."""
    patterns = {
        "uniform (SWIFT's start)": space.uniform(),
        "every 4th FFN": space.every(ffn=4),
        "every 3rd FFN": space.every(ffn=3),
        "every 2nd FFN": space.every(ffn=2),
        "every 2nd attention": space.every(attn=2),
    }
    return {name: s for name, s in patterns.items() if s.skip_attn or s.skip_ffn}


# -- searching -------------------------------------------------------------------------------------


class Recording:
    """A window that remembers what was scored on it."""

    def __init__(self, window: Window, scored: dict[SubNetwork, list[Outcome]]) -> None:
        self._window, self._scored = window, scored

    @property
    def key(self) -> Hashable:
        """See `Window.key`."""
        return self._window.key

    def score(self, subnetwork: SubNetwork) -> Outcome:
        """See `Window.score`."""
        outcome = self._window.score(subnetwork)
        self._scored.setdefault(subnetwork, []).append(outcome)
        return outcome


class Method:
    """A search, its clock and what it held best at the checkpoints.

    steps: that a window serves for, before the next one.
    """

    def __init__(self, name: str, searcher: Searcher, *, own_past: bool, steps: int) -> None:
        self.name, self.searcher, self.own_past = name, searcher, own_past
        self.seconds = 0.0
        self.checkpoints: list[Checkpoint] = []
        self.scored: dict[SubNetwork, list[Outcome]] = {}
        self._steps = steps
        self._before = searcher.best
        self._done: Counter[Hashable] = Counter()  # steps by text

    def work(self, text: Hashable, windows: Sequence[Window], *, until: float) -> None:
        """Continues the search on a text until it has used `until` seconds in total.

        The last step may take longer: the next slice is shorter by that, and what the step brings
        counts from then on only.
        """
        while self.seconds < until and not self.searcher.done:
            window = windows[self._done[text] // self._steps % len(windows)]
            self._before = self.searcher.best
            start = perf_counter()
            self.searcher.step(Recording(window, self.scored))
            self.seconds += perf_counter() - start
            self._done[text] += 1
        best = self.searcher.best if self.seconds <= until else self._before
        self.checkpoints.append(Checkpoint(seconds=until, steps=self._done.total(), best=best))


def _methods(space: Space, costs: Costs, options: Options) -> list[Method]:
    """Our search first: for this machine's costs, and for a machine where width is free."""
    methods = [
        Method(name, Search(space, priced, seed=options.seed), own_past=False, steps=STEPS)
        for name, priced in (("ours, width free", FreeWidth(costs)), ("ours", costs))
    ]
    for ratio in options.ratios:
        paper = PaperSearch(space, PaperOptions(skip_ratio=ratio, seed=options.seed))
        methods.append(Method(f"paper, r={ratio:g}", paper, own_past=True, steps=1))
    return methods


def _search(
    model: Model,
    documents: Sequence[Document],
    methods: Sequence[Method],
    options: Options,
    progress: Progress,
) -> None:
    rounds = max(1, round(options.checkpoints / len(documents)))
    n_slices = rounds * len(documents)
    for i in range(n_slices):
        text = i % len(documents)
        document = documents[text]
        hold(model, document.tokens)
        until = options.seconds * (i + 1) / n_slices
        for method in methods:
            cut = windows(model, document, WINDOW, own_past=method.own_past)
            # a short rest would score as a whole window does
            whole = [window for window in cut if window.n == WINDOW] or cut
            method.work(text, whole, until=until)
        steps = ", ".join(f"{m.name}: {m.checkpoints[-1].steps}" for m in methods)
        progress(f"searched {until:.1f} of {options.seconds:g} s each; steps of {steps}")


def best_by_cost(
    scored: Mapping[SubNetwork, Sequence[Outcome]], costs: Costs
) -> dict[str, SubNetwork]:
    """The fastest by what a search has seen where width is free, of each tenth of a pass's time.

    Of those seen on two windows at least: the best of hundreds on one is the luckiest.
    """
    objective = Objective(costs=FreeWidth(costs))
    best: dict[int, tuple[float, SubNetwork]] = {}
    for subnetwork, outcomes in scored.items():
        if len(outcomes) < 2:
            continue
        number = int(pass_share(costs, subnetwork) / BIN)
        speedup = objective.rate(subnetwork, outcomes).speedup
        if number not in best or speedup > best[number][0]:
            best[number] = speedup, subnetwork
    return {
        f"{BY_COST} {number * BIN:.1f}-{(number + 1) * BIN:.1f}": best[number][1]
        for number in sorted(best)
    }


# -- judging ---------------------------------------------------------------------------------------


def _score(model: Model, documents: Sequence[Document], report: Report, progress: Progress) -> None:
    """Scores everything of interest, all of it on the same texts even if interrupted."""
    noted = (point.best for points in report.runs.values() for point in points)
    candidates = list(dict.fromkeys([*report.named.values(), *noted]))
    found: dict[SubNetwork, list[Outcome]] = {subnetwork: [] for subnetwork in candidates}
    assert report.costs is not None
    for number, document in enumerate(documents):
        progress(f"scoring {len(found)} sub-networks on text {number + 1} of {len(documents)}")
        hold(model, document.tokens)
        (window,) = windows(model, document, len(document.answer), own_past=False)
        for subnetwork, outcome in [(s, window.score(s)) for s in candidates]:
            found[subnetwork].append(outcome)
        # only now, so that an interrupt leaves no text half done
        report.scores = {s: score(s, outcomes, report.costs) for s, outcomes in found.items()}


# -- estimators ------------------------------------------------------------------------------------


class _Live:
    """Counts accepted and rejected draft tokens."""

    def __init__(self) -> None:
        self.drafts = self.first = self.judged = self.accepted = 0

    def observe(self, tree: Tree, accepted: Sequence[int]) -> None:
        self.drafts += 1
        self.first += len(accepted) > 0
        self.judged += min(len(accepted) + 1, len(tree))
        self.accepted += len(accepted)


def _estimate(
    model: Model, documents: Sequence[Document], report: Report, progress: Progress
) -> None:
    agreements = {subnetwork: found.agreement for subnetwork, found in report.scores.items()}
    chosen = varied(agreements, report.options.estimates)
    live = {subnetwork: _Live() for subnetwork in chosen}
    own: dict[SubNetwork, list[bool]] = {subnetwork: [] for subnetwork in chosen}
    target: dict[SubNetwork, list[bool]] = {subnetwork: [] for subnetwork in chosen}
    for number, document in enumerate(documents):
        progress(f"drafting with {len(chosen)} on text {number + 1} of {len(documents)}")
        hold(model, document.tokens)
        for subnetwork in chosen:
            for own_past, agrees in ((True, own), (False, target)):
                for window in windows(model, document, WINDOW, own_past=own_past):
                    agrees[subnetwork] += window.score(subnetwork).agrees.tolist()
        for subnetwork in chosen:
            _draft(model, document, subnetwork, live[subnetwork])
        report.estimates = {
            s: Estimate(
                pass_share=report.scores[s].pass_share,
                own_past=sum(own[s]) / len(own[s]),
                target_past=sum(target[s]) / len(target[s]),
                live_first=live[s].first / live[s].drafts,
                live_judged=live[s].accepted / live[s].judged,
            )
            for s in chosen
            if live[s].drafts
        }


def _draft(model: Model, document: Document, subnetwork: SubNetwork, live: _Live) -> None:
    """Generates the answer again, with drafts that never stop early."""
    drafter = LayerSkip(model, subnetwork)
    drafter.watch(lambda cycle: live.observe(cycle.tree, cycle.verdict.accepted))
    with Sampler(model, SamplingOptions(temperature=0, seed=0)) as sampler:
        for _ in generate(
            model,
            document.prompt.tokens,
            sampler=sampler,
            drafter=drafter,
            draft_max=LIVE_DRAFT_MAX,
            max_tokens=len(document.answer),
        ):
            pass


# -- the command -----------------------------------------------------------------------------------


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e6:
        raise ValueError
    return number


def _ratios(text: str) -> tuple[float, ...]:
    numbers = tuple(float(part) for part in text.split(","))
    if not all(0 < number < 1 for number in numbers):
        raise ValueError
    return numbers


def main(arguments: Sequence[str]) -> int:
    parser = suite_parser("search", __doc__, prompts=8, tokens=128)
    parser.add_argument(
        "--seconds", type=_seconds, default=120.0, metavar="S", help="of search, each method"
    )
    parser.add_argument(
        "--ratios", type=_ratios, default=(0.15, 0.3, 0.45), metavar="R,..", help="the paper's r"
    )
    parser.add_argument(
        "--estimates",
        type=int,
        default=8,
        metavar="N",
        help="sub-networks to draft with, to compare estimators; 0: none",
    )
    args = parser.parse_args(arguments)
    options = Options(
        tokens=args.tokens,
        seconds=args.seconds,
        ratios=args.ratios,
        estimates=args.estimates,
        seed=args.seed,
    )
    report = Report(options=options)
    return finish(args, report, run=lambda: _run(args, report), plot=plot, render=render)


def _run(args: argparse.Namespace, report: Report) -> None:
    with Model(models.resolve(args.model), suite_options(args)) as model:
        chosen = corpus.prompts(
            model, args.suite, args.prompts, longest=args.max_prompt, seed=args.seed
        )
        measure(model, chosen, report, progress=tell)
