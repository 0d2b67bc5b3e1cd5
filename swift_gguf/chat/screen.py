"""The interface of a chat's screen, and the screen for pipes and files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TextIO

from swift_gguf.chat.settings import Settings
from swift_gguf.engine import TARGET
from swift_gguf.text.thinking import Part


class View(Protocol):
    """Shows an answer while it is generated."""

    def feed(self, text: str, parts: Sequence[Part]) -> None:
        """Adds a token.

        text: its text.
        parts: the same text as parts, without the marks around thoughts.
        """
        ...


class Screen(Protocol):
    """Shows a chat."""

    def note(self, text: str) -> None:
        """Shows a line of information."""
        ...

    def lines(self, lines: Sequence[str]) -> None:
        """Shows the output of a command."""
        ...

    def sources(self, runs: Sequence[tuple[str, str]], legend: str) -> None:
        """Shows an answer by its sources.

        runs: (source, text) pairs.
        """
        ...

    def answer(self, settings: Settings) -> AbstractContextManager[View]:
        """A context manager for one answer."""
        ...


class Plain:
    """Writes answers to standard output and notes to standard error."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out, self._err = out or sys.stdout, err or sys.stderr

    def note(self, text: str) -> None:
        """See `Screen`."""
        print(text, file=self._err, flush=True)

    def lines(self, lines: Sequence[str]) -> None:
        """See `Screen`."""
        print("\n".join(lines), file=self._out, flush=True)

    def sources(self, runs: Sequence[tuple[str, str]], legend: str) -> None:
        """See `Screen`.  Draft tokens are in braces."""
        shown = (text if source == TARGET else f"{{{source}:{text}}}" for source, text in runs)
        self.lines(["".join(shown), legend])

    def answer(self, settings: Settings) -> AbstractContextManager[View]:
        """See `Screen`."""
        return _PlainView(self._out, hides_thoughts=settings.thinking == "hide")


class _PlainView:
    def __init__(self, out: TextIO, *, hides_thoughts: bool) -> None:
        self._out, self._hides_thoughts = out, hides_thoughts

    def feed(self, text: str, parts: Sequence[Part]) -> None:
        """See `View`."""
        if self._hides_thoughts:
            text = "".join(part.text for part in parts if not part.is_thought)
        print(text, end="", file=self._out, flush=True)

    def __enter__(self) -> _PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        print(file=self._out, flush=True)
