"""What a search costs on the first answers of a model that nothing is known of."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from swift_gguf.bench.corpus import Progress, Prompt, decode
from swift_gguf.errors import UnsupportedModelError
from swift_gguf.model import Model
from swift_gguf.profile import Store
from swift_gguf.speculation import Speculation, SpeculationOptions
from swift_gguf.subnetwork import SubNetwork


@dataclass(frozen=True, kw_only=True)
class ColdAnswer:
    """One of the first answers with an empty profile."""

    prompt_s: float
    cycle_s: float
    """The search between the cycles included."""
    search_s: float
    tokens: int
    steps: int
    """Sub-networks scored so far."""
    predicted_speedup: float | None
    """Of the best so far; None while too little is known."""


@dataclass(kw_only=True)
class Cold:
    """A search on the fly, from nothing."""

    measuring_s: float
    """Costs of passes, once a model and machine."""
    best: SubNetwork
    answers: list[ColdAnswer] = field(default_factory=list)

    @property
    def search_s(self) -> float:
        return sum(answer.search_s for answer in self.answers)

    @property
    def total_s(self) -> float:
        """From the first prompt to the last token, and measuring before that."""
        return self.measuring_s + sum(answer.prompt_s + answer.cycle_s for answer in self.answers)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "measuring_s": self.measuring_s,
            "search_s": self.search_s,
            "total_s": self.total_s,
            "best": layers(self.best),
            "answers": [asdict(answer) for answer in self.answers],
        }


def measure_cold(
    model: Model,
    prompts: Sequence[Prompt],
    report: Report,
    *,
    tokens: int,
    draft_max: int = 8,
    progress: Progress,
) -> None:
    """Answers all prompts once, nothing known before, with the search on the fly.

    Raises:
        UnsupportedModelError: the model cannot be rolled back, or has nothing to skip.
    """
    report.machine, report.subject = report.machine or machine(), subject(model)
    report.prompts = list(prompts)
    model.clear()
    options = SpeculationOptions(mode="layer-skip", draft_max=draft_max)
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        speculation = Speculation(model, options, store=Store(Path(folder)))
        measuring_s = perf_counter() - start
        learning = speculation.learning
        if learning is None:
            raise UnsupportedModelError(f"nothing to search: {speculation.why}")
        cold = report.cold = Cold(measuring_s=measuring_s, best=learning.best)
        try:
            for number, prompt in enumerate(prompts):
                model.clear()
                stats, _ = decode(model, prompt, speculation, tokens)
                cold.best = learning.best
                cold.answers.append(
                    ColdAnswer(
                        prompt_s=stats.prompt_s,
                        cycle_s=stats.cycle_s,
                        search_s=stats.search_s,
                        tokens=stats.predicted_n,
                        steps=learning.meter.steps,
                        predicted_speedup=learning.predicted_speedup,
                    )
                )
                progress(
                    f"cold, prompt {number + 1} of {len(prompts)}: {learning.meter.steps} scored, "
                    f"search {cold.search_s:.1f} of {cold.total_s:.1f} s"
                )
        finally:
            model.clear()


