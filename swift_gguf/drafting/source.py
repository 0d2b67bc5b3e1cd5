"""What the engine knows of a source of draft tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Draft:
    """A chain of draft tokens with the drafter's own probability of each."""

    tokens: list[int]
    probabilities: list[float]


class Drafter(Protocol):
    """Guesses how the target goes on."""

    @property
    def name(self) -> str: ...

    def draft(self, pending: int, *, n_max: int) -> Draft:
        """At most `n_max` tokens after `pending`, the token that is sampled but not decoded yet.

        Leaves the target's context as it was.
        """
        ...
