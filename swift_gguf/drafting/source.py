"""What the engine knows of a source of draft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from swift_gguf.drafting.tree import Tree


class Drafter(Protocol):
    """Guesses how the target goes on."""

    @property
    def name(self) -> str: ...

    def draft(self, pending: int, *, n_max: int) -> Tree:
        """At most `n_max` tokens after `pending`, the token that is sampled but not decoded yet.

        Leaves the target's context as it was.
        """
        ...

    def observe(self, tree: Tree, accepted: Sequence[int]) -> None:
        """What became of the draft: the target chose the `accepted` nodes, from the root on."""
        ...
