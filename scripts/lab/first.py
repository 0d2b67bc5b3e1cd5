"""The first answer of a model: without known costs of passes, with them, and plain."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from lab import corpus
from lab.command import finish, suite_options, suite_parser, tell
from lab.output import markdown
from swift_gguf.bench.spread import Spread
from swift_gguf.bench.subject import Machine, Subject, machine, subject
from swift_gguf.gguf.identity import profile_key
from swift_gguf.hub import models
from swift_gguf.learning import Profile, Store
from swift_gguf.model import Model
from swift_gguf.sampling import SamplingOptions
from swift_gguf.session import Session
from swift_gguf.speculation import Speculation, SpeculationOptions

PLAIN, COLD, WARM = "--speculation off", "no costs known", "costs measured before"


@dataclass(frozen=True, kw_only=True)
class Run:
    """An answer; times are seconds."""

    mode: str
    prompt: int
    first_s: float
    """From before the speculation is made to the first token."""
    whole_s: float
    tokens: int
    is_same: bool
    """Whether the text is that of plain decoding."""


@dataclass(kw_only=True)
class Report:
    """Filled while the answers come."""

    machine: Machine
    subject: Subject
    runs: list[Run] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    model: Model,
    prompts: Sequence[corpus.Prompt],
    report: Report,
    *,
    tokens: int,
    rounds: int,
    progress: corpus.Progress,
) -> None:
    """Answers every prompt in every mode, in turns.  What one answer learns, no other one has."""
    costs = _measured(model)
    for number in range(rounds):
        for index, prompt in enumerate(prompts):
            plain: list[int] = []
            for mode in (PLAIN, COLD, WARM) if number % 2 == 0 else (PLAIN, WARM, COLD):
                run, ids = _answer(model, prompt.tokens, mode, costs, tokens)
                plain = plain or ids
                run = replace(run, prompt=index, is_same=ids == plain)
                report.runs.append(run)
                progress(
                    f"round {number + 1}, prompt {index + 1}, {mode}: first token after "
                    f"{run.first_s:.2f} s, {run.tokens} tokens in {run.whole_s:.2f} s"
                )
    model.clear()


def _measured(model: Model) -> dict[str, Any]:
    """The costs in a profile after a complete measurement."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        speculation = Speculation(model, store=store)
        if speculation.learning:
            speculation.learning.measure_costs()
        sidecar = model.sidecar.path if model.sidecar else None
        profile = store.load(profile_key(model.path, sidecar))
        return dict(profile.costs) if profile else {}


def _answer(
    model: Model, prompt: Sequence[int], mode: str, costs: dict[str, Any], tokens: int
) -> tuple[Run, list[int]]:
    model.clear()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        if mode == WARM:
            _keep(model, store, costs)
        start = perf_counter()
        options = SpeculationOptions(mode="off" if mode == PLAIN else "auto")
        first_s = 0.0
        with Session(model, Speculation(model, options, store=store)) as session:
            greedy = SamplingOptions(temperature=0.0)
            answer = session.answer(prompt, greedy, max_tokens=tokens)
            for _ in answer:
                first_s = first_s or perf_counter() - start
            whole_s = perf_counter() - start
    run = Run(
        mode=mode,
        prompt=0,
        first_s=first_s,
        whole_s=whole_s,
        tokens=len(answer.tokens),
        is_same=True,
    )
    return run, answer.tokens


def _keep(model: Model, store: Store, costs: dict[str, Any]) -> None:
    sidecar = model.sidecar.path if model.sidecar else None
    store.add(
        Profile(
            fingerprint=profile_key(model.path, sidecar),
            model=model.path.stem,
            n_layer=model.n_layer,
            costs=costs,
        )
    )


def render(report: Report) -> str:
    """Markdown: by mode, against plain decoding of the same prompt in the same round."""
    by_mode = {
        mode: [run for run in report.runs if run.mode == mode] for mode in (PLAIN, COLD, WARM)
    }
    rows = []
    for mode, runs in by_mode.items():
        pairs = list(zip(runs, by_mode[PLAIN], strict=False))
        if not pairs:
            continue
        rows.append(
            [
                mode,
                Spread.of(1e3 * (run.first_s - plain.first_s) for run, plain in pairs).text(0),
                Spread.of(run.whole_s / plain.whole_s for run, plain in pairs).text(),
                f"{max(run.whole_s / plain.whole_s for run, plain in pairs):.2f}",
                f"{sum(r.whole_s for r, _ in pairs) / sum(p.whole_s for _, p in pairs):.2f}",
                f"{sum(run.is_same for run, _ in pairs)} of {len(pairs)}",
            ]
        )
    headers = ["", "first token later, ms", "time against plain", "most", "all", "same texts"]
    return markdown(headers, rows)


def main(arguments: Sequence[str]) -> int:
    parser = suite_parser("first", __doc__, prompts=8, tokens=200)
    parser.add_argument("--rounds", type=int, default=1, metavar="N")
    args = parser.parse_args(arguments)
    with Model(models.resolve(args.model), suite_options(args)) as model:
        chosen = corpus.prompts(
            model, args.suite, n=args.prompts, longest=args.max_prompt, seed=args.seed
        )
        report = Report(machine=machine(), subject=subject(model))
        return finish(
            args,
            report,
            run=lambda: measure(
                model, chosen, report, tokens=args.tokens, rounds=args.rounds, progress=tell
            ),
            render=render,
        )
