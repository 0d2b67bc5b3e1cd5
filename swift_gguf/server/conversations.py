"""Several conversations on one context: the states of the others are kept in memory.

The context holds the text of the latest answer.  The part that a prompt has in common with it is
not processed again.  When a request belongs to another conversation, the current state is saved,
and the state that has most in common with the prompt is loaded.  Saved states are exact to the bit.
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
"""A state is not kept for fewer tokens, because processing them again takes little time."""


@dataclass
class _Kept:
    tokens: list[int]
    state: Any
    """llama_cpp's `LlamaState`."""

    @property
    def size(self) -> int:
        """Bytes, approximately."""
        return int(self.state.llama_state_size + self.state.input_ids.nbytes) + 8 * len(self.tokens)


def _would_lose(tokens: Sequence[int], common: int) -> bool:
    """True if the tokens after the first `common` are worth keeping."""
    return len(tokens) - common >= MIN_TOKENS and common < len(tokens) / 2


class Conversations:
    """Saved states of a llama's context, up to `budget` bytes.

    The least recently used states are dropped first.
    """

    def __init__(self, llama: Llama, *, budget: int) -> None:
        self._llama, self._budget = llama, budget
        self._kept: list[_Kept] = []  # the latest used last

    @property
    def size(self) -> int:
        """Bytes of all saved states."""
        return sum(kept.size for kept in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def enter(self, prompt: Sequence[int]) -> None:
        """Loads the state that has most of the prompt into the context."""
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
            # it may have been dropped to save the current one; a copy stays if it loses much
            stays = any(kept is best for kept in self._kept) and _would_lose(best.tokens, shared)
            others = [kept for kept in self._kept if kept is not best]
            self._kept = [*others, best] if stays else others
            self._llama.load_state(best.state)

    def _shared(self, tokens: Sequence[int], prompt: Sequence[int]) -> int:
        """The number of prompt tokens that a state of these tokens saves.

        A recurrent state with more tokens saves nothing, because it cannot be rolled back.
        """
        common = common_prefix(tokens, prompt)
        model = self._llama.speculation.model
        is_running = model is not None and model.rollback_refusal is not None
        return 0 if is_running and common < len(tokens) else common

    def _present(self) -> list[int]:
        return [int(token) for token in self._llama.input_ids[: self._llama.n_tokens]]

    def _keep(self, tokens: list[int]) -> None:
        """Saves the current state and drops the states that it contains."""
        kept = _Kept(tokens, self._llama.save_state())
        self._kept = [
            other for other in self._kept if common_prefix(other.tokens, tokens) < len(other.tokens)
        ]
        if kept.size <= self._budget:
            self._kept.append(kept)
        while self.size > self._budget:
            dropped = self._kept.pop(0)
            _log.debug("forgot a conversation of %d tokens", len(dropped.tokens))
