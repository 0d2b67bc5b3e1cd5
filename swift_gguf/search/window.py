"""Windows at the end of a text, where candidates are scored on the target's own KV cache.

There are two ways to score a sub-network:

- *target's past* (ours): every position of the window is a sequence of its own that shares the
  target's cells before it.  So each position is scored like the first token of a draft.
- *own past* (SWIFT's): one pass over the window as one text.  Each position sees the sub-network's
  own keys and values in the whole window before it.  In a draft, these are only a few tokens.
"""

from __future__ import annotations

import hashlib

import numpy as np

from swift_gguf.model import Model
from swift_gguf.search.objective import Outcome
from swift_gguf.subnetwork import SubNetwork
from swift_gguf.tokens import common_prefix

MIN_POSITIONS = 8
"""Fewer positions are not worth a pass."""


class TextWindow:
    """Positions start, ..., start + n - 1 of the text in the model's context.

    If scoring is stopped, the scored positions are kept for the next try.

    chunk: the number of positions in a pass.  Short passes can be stopped sooner.
    """

    def __init__(
        self, model: Model, start: int, n: int, *, chunk: int = 32, own_past: bool = False
    ) -> None:
        self.start, self.n = start, n
        self._model = model
        self._chunk = n if own_past else chunk
        self._own_past = own_past
        self._text = model.tokens[: start + n + 1]
        digest = hashlib.blake2b(repr(self._text).encode(), digest_size=8).hexdigest()
        self._key = f"{digest}-{start}-{n}"
        self._found: dict[SubNetwork, list[tuple[bool, float]]] = {}

    @property
    def key(self) -> str:
        """A key of the text and the positions, which is the same in every process."""
        return self._key

    @property
    def is_current(self) -> bool:
        """True if the context still holds the text."""
        return self._model.tokens[: len(self._text)] == self._text

    def score(self, subnetwork: SubNetwork) -> Outcome:
        """Compares the sub-network's draft token at each position with the text.

        Raises:
            StoppedError: the model's stop flag is up; scored positions are kept.
            ContextFullError: there is no room for the window.
        """
        found = self._found.setdefault(subnetwork, [])
        while len(found) < self.n:
            start = self.start + len(found)
            n = min(self._chunk, self.start + self.n - start)
            self._model.redecode(start, n, subnetwork=subnetwork, own_past=self._own_past)
            for row in range(n):
                (guess,), (probability,) = self._model.top(row)
                found.append((guess == self._text[start + row + 1], probability))
        del self._found[subnetwork]
        agrees, confidence = zip(*found, strict=True)
        return Outcome(np.array(agrees), np.array(confidence, dtype=np.float32))


class Windows:
    """The windows of a growing text, for the steps of a search.

    A search compares sub-networks on the same window, so each window is used for several steps.
    The next window is at the end of the text.  If the text has not grown, it is the window before
    the current one, and after the first window the last one again.

    n: the positions of a window.  Windows are shorter while the text is short.
    steps: the number of steps on a window.
    """

    def __init__(
        self, model: Model, *, n: int, steps: int = 8, chunk: int = 32, own_past: bool = False
    ) -> None:
        self.first = 0
        """The position of the first token that the target has generated.  Only generated text shows
        what the target does.  Set it for every generation."""
        self.text: list[int] | None = None
        """What the generation left in the context, once it is over: what others add is not used.
        None: the generation goes on, and all of the context is used."""
        self._model, self._n, self._steps = model, n, steps
        self._chunk, self._own_past = chunk, own_past
        self._current: TextWindow | None = None
        self._text_end = 0
        self._left = 0

    def __call__(self) -> TextWindow | None:
        """The window for the next step; None while the text is too short."""
        current = self._current
        fits = current and current.n <= self._model.room and current.is_current
        if self._left == 0 or not fits:
            end = self._end
            stands_still = fits and self._text_end == end
            before = self._ending_at(current.start) if current and stands_still else None
            # the last token is only used to score the position before it
            self._current = before or self._ending_at(end - 1)
            self._text_end = end
            self._left = self._steps
        self._left -= 1
        return self._current

    @property
    def _end(self) -> int:
        """The number of tokens that may be used."""
        tokens = self._model.tokens
        return len(tokens) if self.text is None else common_prefix(self.text, tokens)

    def _ending_at(self, end: int) -> TextWindow | None:
        start = max(self.first - 1, end - self._n, 0)
        n = min(end - start, self._model.room)
        if n < min(MIN_POSITIONS, self._n):
            return None
        return TextWindow(self._model, end - n, n, chunk=self._chunk, own_past=self._own_past)
