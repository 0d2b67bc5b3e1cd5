"""The interfaces of the sources of draft tokens, for the engine and the planner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from swift_gguf.drafting.tree import Offer, Tree
from swift_gguf.drafting.verification import Verdict


@dataclass(frozen=True)
class Cycle:
    """A draft and the result of its verification."""

    tree: Tree
    verdict: Verdict
    draft_s: float
    verify_s: float
    """Time of the target's forward pass."""


class Drafter(Protocol):
    """Drafts the next tokens of the text."""

    @property
    def name(self) -> str: ...

    @property
    def prompt_s(self) -> float:
        """Seconds of the latest draft in which sources processed the prompt, once in an answer."""
        ...

    def draft(self, pending: int, *, n_max: int) -> Tree:
        """Drafts at most `n_max` tokens after `pending`.

        The pending token is sampled but not decoded yet.  The target's context stays as it is.
        """
        ...

    def observe(self, cycle: Cycle) -> None:
        """Takes the result of the latest draft.  It is also called for an empty draft.

        The context holds the kept tokens.  The logits are still those of the verification: row 0
        for the pending token, row i + 1 for node i.
        """
        ...


class Lookup(Protocol):
    """A source that looks up tokens, which costs almost no time."""

    @property
    def name(self) -> str: ...

    def follow(self, text: Sequence[int]) -> None:
        """Sets the text that is continued: the prompt and the answer with the pending token."""
        ...

    def offers(self, path: Sequence[int]) -> Sequence[Offer]:
        """The likeliest tokens after the text and `path`, likeliest first.  Changes nothing."""
        ...
