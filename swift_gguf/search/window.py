"""The end of a live text as a window: candidates are scored on the target's own cache.

Two estimators of what a sub-network's drafts would be worth:

- *target's past* (ours): every position of the window is a sequence of its own that shares the
  target's cells before it, so each is what the first token of a draft would meet.
- *own past* (SWIFT's): one pass over the window as one text; each position sees what the
  sub-network made of those before it, for the whole window, which no draft does for more than a
  few tokens.
"""

from __future__ import annotations

import hashlib

import numpy as np

from swift_gguf.model import Model
from swift_gguf.search.objective import Outcome
from swift_gguf.subnetwork import SubNetwork

MIN_POSITIONS = 8
"""Fewer say too little to be worth a pass."""


class TextWindow:
    """Positions start, ..., start + n - 1 of the text that the model's context holds.

    What a stopped pass had already scored is kept for the next try.

    chunk: positions scored in one pass; short passes can be stopped sooner.
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
        """A name of the text and the positions, the same in every process."""
        return self._key

    @property
    def is_current(self) -> bool:
        """Does the context still hold the text?"""
        return self._model.tokens[: len(self._text)] == self._text

    def score(self, subnetwork: SubNetwork) -> Outcome:
        """What the sub-network would draft after each position, against the text.

        Raises:
            StoppedError: the model's stop flag is up; scored positions are remembered.
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
    """The windows of one growing text, offered to a search one after another.

    A search compares sub-networks on the same window, so one serves for some steps before the next,
    which ends where the text ends then.  While the text stands still, the windows before it follow,
    and after the first of them the last one again.

    n: positions of a window; shorter ones are made while the text is short.
    """

    def __init__(
        self, model: Model, *, n: int, steps: int = 8, chunk: int = 32, own_past: bool = False
    ) -> None:
        self.first = 0
        """Where the text begins that the target chose itself; others' text would teach what they
        write, not what it does.  To be set for every generation."""
        self._model, self._n, self._steps = model, n, steps
        self._chunk, self._own_past = chunk, own_past
        self._current: TextWindow | None = None
        self._text_end = 0
        self._left = 0

    def __call__(self) -> TextWindow | None:
        """The window of the next step; None while the text is too short."""
        current = self._current
        fits = current and current.n <= self._model.room and current.is_current
        if self._left == 0 or not fits:
            stands_still = fits and self._text_end == self._model.n_past
            before = self._ending_at(current.start) if current and stands_still else None
            # the last token is what the position before it is judged by
            self._current = before or self._ending_at(self._model.n_past - 1)
            self._text_end = self._model.n_past
            self._left = self._steps
        self._left -= 1
        return self._current

    def _ending_at(self, end: int) -> TextWindow | None:
        start = max(self.first - 1, end - self._n, 0)
        n = min(end - start, self._model.room)
        if n < min(MIN_POSITIONS, self._n):
            return None
        return TextWindow(self._model, end - n, n, chunk=self._chunk, own_past=self._own_past)
