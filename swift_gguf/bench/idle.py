"""How long a request waits for the idle search to let go of the model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter, sleep
from typing import Any

from swift_gguf.bench.mechanism import subject
from swift_gguf.bench.output import markdown
from swift_gguf.bench.report import Subject
from swift_gguf.bench.spread import Machine, Spread, machine
from swift_gguf.engine import generate
from swift_gguf.errors import UnsupportedModelError
from swift_gguf.learning import Store
from swift_gguf.model import Model
from swift_gguf.sampling import Sampler, SamplingOptions
from swift_gguf.speculation import Speculation, SpeculationOptions

ANSWER_TOKENS = 24
GAPS_S = (0.2, 3.0)
"""Between which a request follows the one before."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Waiting times are of the model, from the request to its first decode."""

    machine: Machine
    subject: Subject
    wait_ms: Spread
    longest_wait_ms: float
    steps: int
    """What the search made of the time between requests."""
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
    """Plainly decoded, so that nothing but the search can change it."""
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
