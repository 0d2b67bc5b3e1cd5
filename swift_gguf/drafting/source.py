"""What the engine and the planner know of the sources of draft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from swift_gguf.drafting.tree import Offer, Tree
from swift_gguf.drafting.verification import Verdict


@dataclass(frozen=True)
class Cycle:
    """A draft and what became of it."""

    tree: Tree
    verdict: Verdict
    draft_s: float
    verify_s: float
    """The target's pass."""


class Drafter(Protocol):
    """Guesses how the target goes on."""

    @property
    def name(self) -> str: ...

    @property
    def prompt_s(self) -> float:
        """Of the latest draft, the seconds in which sources read the prompt: once an answer."""
        ...

    def draft(self, pending: int, *, n_max: int) -> Tree:
        """At most `n_max` tokens after `pending`, the token that is sampled but not decoded yet.

        Leaves the target's context as it was.
        """
        ...

    def observe(self, cycle: Cycle) -> None:
        """What became of the latest draft, empty ones included.

        The context then holds what was kept, and the logits are still those of the verification:
        row 0 after the pending token, row i + 1 after node i.
        """
        ...


class Lookup(Protocol):
    """A source that costs next to nothing: it looks up what it has seen."""

    @property
    def name(self) -> str: ...

    def follow(self, text: Sequence[int]) -> None:
        """`text` (prompt and answer so far, the pending token included) is what is continued."""
        ...

    def offers(self, path: Sequence[int]) -> Sequence[Offer]:
        """The likeliest tokens after the text and then `path`, likeliest first; none if it knows
        none.  Does not change what is known."""
        ...
