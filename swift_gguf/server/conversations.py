"""Several conversations on one context: the others' states wait in memory.

The context holds the text of the latest answer, and what a prompt has in common with it is not
decoded again.  When a request belongs to another conversation, the present state is put aside, and
the one that has most in common with the prompt is brought back.  Copies are exact: to the bit what
the context held.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift_gguf.llama import Llama
from swift_gguf.tokens import common_prefix

_log = logging.getLogger("swift_gguf")

MIN_TOKENS = 64
"""Fewer are decoded sooner than it is worth to keep them."""


@dataclass
class _Kept:
    tokens: list[int]
    state: Any
    """llama_cpp's `LlamaState`."""

    @property
    def size(self) -> int:
        """Bytes, near enough."""
        return int(self.state.llama_state_size + self.state.input_ids.nbytes) + 8 * len(self.tokens)


def _would_lose(tokens: Sequence[int], common: int) -> bool:
    """Is it too much to forget, what these have after the first `common`?"""
    return len(tokens) - common >= MIN_TOKENS and common < len(tokens) / 2


class Conversations:
    """States of a llama's context, within `budget` bytes; those unused for longest go first."""

    def __init__(self, llama: Llama, *, budget: int) -> None:
        self._llama, self._budget = llama, budget
        self._kept: list[_Kept] = []  # the latest used last

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(kept.size for kept in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def enter(self, prompt: Sequence[int]) -> None:
        """The context becomes the one that has most of the prompt."""
        if self._budget == 0:
            return
        here = self._present()
        common = self._shared(here, prompt)
        best = max(self._kept, key=lambda kept: self._shared(kept.tokens, prompt), default=None)
        if _would_lose(here, common):
            self._keep(here)
        if best is None:
            return
        shared = self._shared(best.tokens, prompt)
        if shared - common >= MIN_TOKENS:
            # it may have been dropped for the present one; of what it loses most, a copy stays
            stays = any(kept is best for kept in self._kept) and _would_lose(best.tokens, shared)
            others = [kept for kept in self._kept if kept is not best]
            self._kept = [*others, best] if stays else others
            self._llama.load_state(best.state)

    def _shared(self, tokens: Sequence[int], prompt: Sequence[int]) -> int:
        """How much of the prompt a state of these tokens saves: nothing of a running state that is
        beyond it, which cannot be taken back."""
        common = common_prefix(tokens, prompt)
        model = self._llama.speculation.model
        is_running = model is not None and model.rollback_refusal is not None
        return 0 if is_running and common < len(tokens) else common

    def _present(self) -> list[int]:
        return [int(token) for token in self._llama.input_ids[: self._llama.n_tokens]]

    def _keep(self, tokens: list[int]) -> None:
        """The present state; those that it contains go."""
        kept = _Kept(tokens, self._llama.save_state())
        self._kept = [
            other for other in self._kept if common_prefix(other.tokens, tokens) < len(other.tokens)
        ]
        if kept.size <= self._budget:
            self._kept.append(kept)
        while self.size > self._budget:
            dropped = self._kept.pop(0)
            _log.debug("forgot a conversation of %d tokens", len(dropped.tokens))
