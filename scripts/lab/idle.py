"""How long a request waits until the idle search releases the model."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from lab.command import model_parser, positive, tell
from lab.output import markdown, write_json
from swift_gguf.bench.spread import Spread
from swift_gguf.bench.subject import Machine, Subject, machine, subject
from swift_gguf.engine import generate
from swift_gguf.errors import UnsupportedModelError
from swift_gguf.hub import models
from swift_gguf.learning import Store
from swift_gguf.model import Model, ModelOptions
from swift_gguf.outputs import require_folder
from swift_gguf.sampling import Sampler, SamplingOptions
from swift_gguf.speculation import Speculation, SpeculationOptions
from swift_gguf.suite import BUILT_IN
from swift_gguf.text import encode

ANSWER_TOKENS = 24
GAPS_S = (0.2, 3.0)
"""Minimum and maximum time between two requests."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Waiting times for the model: from the request to its first decode."""

    machine: Machine
    subject: Subject
    wait_ms: Spread
    longest_wait_ms: float
    steps: int
    """What the search did between requests."""
    same_texts: int
    requests: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    requests: int,
    store: Store,
    seed: int = 0,
    progress: Callable[[str], None],
) -> Report:
    """Requests at random times while a search runs, then the same without one.

    Raises:
        UnsupportedModelError: there is nothing to search.
    """
    speculation = Speculation(model, SpeculationOptions(mode="layer-skip"), store=store)
    idle = speculation.idle_search()
    if idle is None:
        raise UnsupportedModelError(f"no idle search: {speculation.why}")
    rng = random.Random(seed)
    waits, texts = [], []
    with idle:
        for number in range(requests):
            sleep(rng.uniform(*GAPS_S))
            prompt = prompts[number % len(prompts)]
            start = perf_counter()
            with idle.paused():
                waits.append(1e3 * (perf_counter() - start))
                speculation.begin(len(prompt))
                texts.append(_answer(model, prompt))
            progress(f"request {number + 1} of {requests}: waited {waits[-1]:.1f} ms")
    model.clear()
    same = 0
    for number, text in enumerate(texts):
        same += _answer(model, prompts[number % len(prompts)]) == text
    return Report(
        machine=machine(),
        subject=subject(model),
        wait_ms=Spread.of(waits),
        longest_wait_ms=max(waits),
        steps=idle.meter.steps,
        same_texts=same,
        requests=requests,
    )


def _answer(model: Model, prompt: Sequence[int]) -> list[int]:
    """Decodes an answer plainly, so that only the search could change it."""
    with Sampler(model, SamplingOptions(temperature=0)) as sampler:
        tokens = generate(model, prompt, sampler=sampler, max_tokens=ANSWER_TOKENS)
        return [token.id for token in tokens]


def render(report: Report) -> str:
    """Markdown."""
    rows = [
        [
            report.subject.name,
            report.wait_ms.text(1),
            f"{report.longest_wait_ms:.1f}",
            f"{report.steps}",
            f"{report.same_texts} of {report.requests}",
        ]
    ]
    headers = ["model", "wait, ms", "longest, ms", "search steps between", "same texts"]
    return markdown(headers, rows)


def main(arguments: Sequence[str]) -> int:
    parser = model_parser("idle", __doc__)
    parser.add_argument("--requests", type=positive, default=25, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the times between")
    args = parser.parse_args(arguments)
    require_folder(args.json)
    options = ModelOptions(n_ctx=1024, n_threads=args.threads, n_gpu_layers=args.n_gpu_layers)
    with (
        Model(models.resolve(args.model), options) as model,
        tempfile.TemporaryDirectory() as profiles,
    ):
        report = measure(
            model,
            [encode(model, text) for text in BUILT_IN],
            requests=args.requests,
            store=Store(Path(profiles)),
            seed=args.seed,
            progress=tell,
        )
    if args.json:
        write_json(args.json, report.as_dict())
    print(render(report))
    return 0
