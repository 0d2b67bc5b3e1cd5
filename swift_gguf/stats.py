"""Statistics of a generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swift_gguf.drafting.tree import Tree


@dataclass
class SourceStats:
    """Statistics of one source of drafts."""

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_lengths: Counter[int] = field(default_factory=Counter)
    """Number of accepted tokens: number of drafts."""

    def count(self, *, drafted: int, accepted: int) -> None:
        self.drafts += 1
        self.drafted += drafted
        self.accepted += accepted
        self.accepted_lengths[accepted] += 1

    def add(self, other: SourceStats) -> None:
        """Adds the counts of another generation."""
        self.drafts += other.drafts
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.accepted_lengths += other.accepted_lengths

    def as_dict(self) -> dict[str, Any]:
        lengths = range(max(self.accepted_lengths, default=-1) + 1)
        return {
            "drafts": self.drafts,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "accepted_length_histogram": [self.accepted_lengths[n] for n in lengths],
        }


@dataclass
class Stats:
    """Statistics of one generation, or of several added up.  Times are in seconds and exclude the
    consumer's own time."""

    prompt_n: int = 0
    """Prompt tokens decoded, without those that the KV cache already held."""
    prompt_s: float = 0.0
    """Prompt processing, including that of a draft model."""
    predicted_n: int = 0
    cycles: int = 0
    """Forward passes of the target after the prompt."""
    plain_cycles: int = 0
    """Those of them without a draft."""
    cycle_n: int = 0
    """Tokens from these passes, including an end-of-generation token."""
    draft_s: float = 0.0
    verify_s: float = 0.0
    plain_s: float = 0.0
    """The part of `verify_s` in plain cycles."""
    sample_s: float = 0.0
    search_s: float = 0.0
    cycle_s: float = 0.0
    """All cycles together."""
    sources: dict[str, SourceStats] = field(default_factory=dict)
    stop_reason: str = ""
    """``eos``, ``length`` (token limit), ``context`` (full) or ``stopped`` (by the consumer)."""

    def count(self, tree: Tree, accepted: Sequence[int]) -> None:
        """Counts a draft and its accepted nodes for the sources that proposed them."""
        for name, drafted in Counter(tree.sources).items():
            source = self.sources.setdefault(name, SourceStats())
            of_it = sum(tree.sources[node] == name for node in accepted)
            source.count(drafted=drafted, accepted=of_it)

    def add(self, other: Stats) -> None:
        """Adds the counts and seconds of another generation."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, source in other.sources.items():
            self.sources.setdefault(name, SourceStats()).add(source)

    @property
    def drafted(self) -> int:
        return sum(source.drafted for source in self.sources.values())

    @property
    def accepted(self) -> int:
        return sum(source.accepted for source in self.sources.values())

    @property
    def acceptance_rate(self) -> float:
        """Accepted draft tokens divided by all draft tokens, 0 to 1."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per target pass, including the target's own; 1 for plain decoding."""
        return self.cycle_n / self.cycles if self.cycles else 1.0

    @property
    def overhead_s(self) -> float:
        """Time in the cycles outside llama.cpp."""
        return max(0.0, self.cycle_s - self.draft_s - self.verify_s - self.sample_s - self.search_s)

    @property
    def tokens_per_second(self) -> float:
        """Speed of the cycles.  The first token is not counted: it comes with the prompt."""
        return (self.predicted_n - 1) / self.cycle_s if self.cycle_s else 0.0

    def timings(self) -> dict[str, Any]:
        """llama-server's `timings`, under its names."""
        return {
            "prompt_n": self.prompt_n,
            "prompt_ms": self.prompt_s * 1e3,
            "predicted_n": self.predicted_n,
            "predicted_ms": self.cycle_s * 1e3,
            "predicted_per_second": self.tokens_per_second,
            "draft_n": self.drafted,
            "draft_n_accepted": self.accepted,
        }

    def speculation(self) -> dict[str, Any]:
        """The sources of drafts, their acceptance, and the time spent on each step."""
        return {
            "sources": {name: source.as_dict() for name, source in self.sources.items()},
            "acceptance_rate": self.acceptance_rate,
            "mean_acceptance_length": self.mean_acceptance_length,
            "seconds": {
                "draft": self.draft_s,
                "verify": self.verify_s,
                "search": self.search_s,
                "other": self.sample_s + self.overhead_s,
            },
        }


_SUMS = tuple(field.name for field in fields(Stats) if field.name not in ("sources", "stop_reason"))
