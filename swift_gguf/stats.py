"""What happened during a generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swift_gguf.drafting.tree import Tree


@dataclass
class SourceStats:
    """Of one source of drafts."""

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_lengths: Counter[int] = field(default_factory=Counter)
    """Number of drafts by how many of their tokens were accepted."""

    def count(self, *, drafted: int, accepted: int) -> None:
        self.drafts += 1
        self.drafted += drafted
        self.accepted += accepted
        self.accepted_lengths[accepted] += 1

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
    """Of one generation.  Times are seconds; the consumer's own time is in none of them."""

    prompt_n: int = 0
    """Prompt tokens decoded (those the context held already are not)."""
    prompt_s: float = 0.0
    """The prompt's passes, those of a draft model included."""
    predicted_n: int = 0
    cycles: int = 0
    """Target passes after the prompt."""
    plain_cycles: int = 0
    """Of these passes, those that verified no draft."""
    cycle_n: int = 0
    """Tokens these passes gave, an end of generation included."""
    draft_s: float = 0.0
    verify_s: float = 0.0
    plain_s: float = 0.0
    """Of which the plain cycles' passes."""
    sample_s: float = 0.0
    search_s: float = 0.0
    cycle_s: float = 0.0
    """All cycles, start to end."""
    sources: dict[str, SourceStats] = field(default_factory=dict)
    stop_reason: str = ""
    """``eos``, ``length`` (the limit), ``context`` (it is full), ``stopped`` (by the consumer)."""

    def count(self, tree: Tree, accepted: Sequence[int]) -> None:
        """A draft, and its nodes that were accepted, to the sources that offered them."""
        for name, drafted in Counter(tree.sources).items():
            source = self.sources.setdefault(name, SourceStats())
            of_it = sum(tree.sources[node] == name for node in accepted)
            source.count(drafted=drafted, accepted=of_it)

    @property
    def drafted(self) -> int:
        return sum(source.drafted for source in self.sources.values())

    @property
    def accepted(self) -> int:
        return sum(source.accepted for source in self.sources.values())

    @property
    def acceptance_rate(self) -> float:
        """Accepted of drafted tokens, 0 to 1."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens a target pass yields, its own included; plain decoding has 1."""
        return self.cycle_n / self.cycles if self.cycles else 1.0

    @property
    def overhead_s(self) -> float:
        """Everything in the cycles that is not a call of llama.cpp."""
        return max(0.0, self.cycle_s - self.draft_s - self.verify_s - self.sample_s - self.search_s)

    @property
    def tokens_per_second(self) -> float:
        """Of the cycles alone: the first token comes with the prompt."""
        return (self.predicted_n - 1) / self.cycle_s if self.cycle_s else 0.0

    def timings(self) -> dict[str, Any]:
        """llama-server's `timings`, by its names."""
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
        """Where drafts came from, how they fared, where the time went."""
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
