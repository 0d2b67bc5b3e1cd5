"""The cost of the search during the first answers of a model without a profile."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lab.corpus import Progress, Prompt, decode
from lab.output import layers
from swift_gguf.errors import UnsupportedModelError
from swift_gguf.learning import Store
from swift_gguf.model import Model
from swift_gguf.speculation import Speculation, SpeculationOptions
from swift_gguf.subnetwork import SubNetwork


@dataclass(frozen=True, kw_only=True)
class ColdAnswer:
    """One of the first answers."""

    prompt_s: float
    cycle_s: float
    """The search between the cycles included."""
    search_s: float
    tokens: int
    steps: int
    """Sub-networks scored so far."""
    predicted_speedup: float | None
    """The best sub-network's so far; None while too little is known."""


@dataclass(kw_only=True)
class Cold:
    """Filled while the answers come; times are seconds."""

    best: SubNetwork | None = None
    answers: list[ColdAnswer] = field(default_factory=list)

    @property
    def search_s(self) -> float:
        return sum(answer.search_s for answer in self.answers)

    @property
    def total_s(self) -> float:
        """Time of all prompts and answers."""
        return sum(answer.prompt_s + answer.cycle_s for answer in self.answers)

    @property
    def share(self) -> float:
        """The share of all time that the search takes."""
        return self.search_s / self.total_s if self.answers else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "search_s": self.search_s,
            "total_s": self.total_s,
            "share": self.share,
            "best": layers(self.best) if self.best else None,
            "answers": [asdict(answer) for answer in self.answers],
        }

    def line(self) -> str:
        """The report as text."""
        if not self.answers:
            return "From nothing: no answer was finished"
        last = self.answers[-1]
        speedup = f"{last.predicted_speedup:.2f}x" if last.predicted_speedup else "not known yet"
        return (
            f"From nothing, {len(self.answers)} answers: "
            f"search {self.search_s:.2f} s, {self.share:.1%} of {self.total_s:.1f} s; "
            f"{last.steps} scored; best {self.best}, predicted {speedup}"
        )


def measure_cold(
    model: Model,
    prompts: Sequence[Prompt],
    cold: Cold,
    *,
    tokens: int,
    draft_max: int = 8,
    progress: Progress,
) -> None:
    """Answers all prompts once, with the search on the fly.  Leaves the context empty.

    Raises:
        UnsupportedModelError: the model cannot be rolled back, or has nothing to skip.
    """
    model.clear()
    options = SpeculationOptions(mode="layer-skip", draft_max=draft_max)
    with tempfile.TemporaryDirectory() as folder:
        speculation = Speculation(model, options, store=Store(Path(folder)))
        learning = speculation.learning
        if learning is None:
            raise UnsupportedModelError(f"nothing to search: {speculation.why}")
        try:
            for prompt in prompts:
                model.clear()
                stats, _ = decode(model, prompt, speculation, tokens)
                cold.best = learning.best
                known = learning.best_known
                cold.answers.append(
                    ColdAnswer(
                        prompt_s=stats.prompt_s,
                        cycle_s=stats.cycle_s,
                        search_s=stats.search_s,
                        tokens=stats.predicted_n,
                        steps=learning.meter.steps,
                        predicted_speedup=known.rate.speedup if known else None,
                    )
                )
                progress(cold.line())
        finally:
            model.clear()
