"""The screen for a terminal: answers as Markdown, drawn while they are generated."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter

from rich.console import Console
from rich.live import Live
from rich.segment import Segment, Segments
from rich.text import Text

from swift_gguf.chat.markdown import THEME, Markdown, rendered, split
from swift_gguf.chat.reflow import Line, place, text_of, without
from swift_gguf.chat.screen import View
from swift_gguf.chat.settings import Settings
from swift_gguf.text.thinking import Part

SOURCE_STYLES = {
    "ngram": "green underline",
    "recycling": "yellow underline",
    "layer-skip": "cyan underline",
    "draft-model": "magenta underline",
}

THOUGHT_LINES = 6
"""Lines of thoughts that are shown while the model thinks, if they are folded later."""

DRAWING_SHARE = 0.03
"""Maximum share of the time that drawing takes from decoding."""
MIN_INTERVAL_S, MAX_INTERVAL_S = 0.04, 0.5


def console() -> Console:
    """Standard output, with colours for light and dark backgrounds; respects NO_COLOR."""
    return Console(theme=THEME, highlight=False, soft_wrap=False)


class Terminal:
    """A `Screen` for a terminal."""

    def __init__(self, output: Console | None = None) -> None:
        self.console = output or console()

    def note(self, text: str) -> None:
        """See `Screen`."""
        self.console.print(Text(text, style="dim"))

    def error(self, text: str) -> None:
        """Shows an error message."""
        self.console.print(Text(text, style="red"))

    def lines(self, lines: Sequence[str]) -> None:
        """See `Screen`."""
        self.console.print(Text(harmless("\n".join(lines))))

    def sources(self, runs: Sequence[tuple[str, str]], legend: str) -> None:
        """See `Screen`."""
        text = Text()
        for source, words in runs:
            text.append(harmless(words), style=SOURCE_STYLES.get(source, ""))
        self.console.print(text)
        line = Text("\n" + legend, style="dim")
        for source, style in SOURCE_STYLES.items():
            line.highlight_words([source], style=f"not dim {style}")
        self.console.print(line)

    @contextmanager
    def answer(self, settings: Settings) -> Iterator[View]:
        """See `Screen`."""
        with _silent_keyboard(), _Drawing(self.console, settings) as view:
            yield view


@contextmanager
def _silent_keyboard() -> Iterator[None]:
    """Turns the echo off, so that typed keys do not appear in the answer; the prompt gets them.

    Ctrl-C does not discard output that is still on its way to the terminal.
    """
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, AttributeError, termios.error):  # not a terminal
        yield
        return
    silent = [*before]
    silent[3] = silent[3] & ~termios.ECHO | termios.NOFLSH
    termios.tcsetattr(descriptor, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


class _Drawing(AbstractContextManager["_Drawing"]):
    """Draws an answer: complete blocks are printed once, the last one is redrawn.

    If the last block is too tall to be redrawn, its first lines are printed before it is complete.
    The position of its rest is counted in lines, and is searched again when the width changes.
    """

    def __init__(self, output: Console, settings: Settings) -> None:
        self._console, self._settings = output, settings
        self._live = Live(console=output, auto_refresh=False, transient=True)
        self._thought, self._text = "", ""
        self._thought_n = 0
        self._begin_block()
        self._size = output.size
        self._rows: list[Line] = []  # redrawn lines; the first ones belong to the answer
        self._n_answer_rows = 0
        self._has_gap = False  # an empty line separates the last block from the text above
        self._begun = perf_counter()
        self._thought_s: float | None = None
        self._next = 0.0
        self._n = 0

    def __enter__(self) -> _Drawing:
        self._live.start()
        self._draw(rendered(self._console, Text("reading …", style="dim")))
        return self

    def _begin_block(self) -> None:
        self._printed: list[Line] = []  # lines of the last block that are printed already
        self._n_lines = self._n_chars = 0  # position of its rest: see `place`
        self._width: int | None = None  # layout width of the last block; None: the window's

    def __exit__(self, *_: object) -> None:
        try:
            with self._console:
                self._fit()
                self._end_thought()
                self._print_text(final=True)
        finally:
            self._live.stop()
        self._console.print()

    def feed(self, text: str, parts: Sequence[Part]) -> None:
        """See `View`."""
        self._n += bool(text)
        for part in parts:
            words = harmless(part.text)
            if part.is_thought:
                self._thought += words
                self._thought_n += 1
            else:
                self._end_thought()
                self._text += words
        now = perf_counter()
        if now < self._next:
            return
        with self._console:  # one write for everything avoids flicker
            self._refresh()
        took = perf_counter() - now
        self._next = now + min(MAX_INTERVAL_S, max(MIN_INTERVAL_S, took / DRAWING_SHARE))

    # -- thoughts ----------------------------------------------------------------------------------

    def _end_thought(self) -> None:
        """Replaces the thoughts by a line, or keeps them, as the settings say."""
        if not self._thought or self._thought_s is not None:
            return
        self._thought_s = perf_counter() - self._begun
        thought = self._thought.strip()
        if self._settings.thinking != "show":
            how = "" if self._settings.thinking == "hide" else "; /show thinking shows the text"
            thought = f"thought for {self._thought_s:.1f} s, {self._thought_n} tokens{how}"
        self._print(rendered(self._console, Text(thought, style="dim italic")))
        self._has_gap = True

    def _thinking(self) -> list[Line]:
        if self._settings.thinking == "hide":
            return rendered(self._console, Text("thinking …", style="dim italic"))
        n = self._height if self._settings.thinking == "show" else THOUGHT_LINES
        latest = "\n".join(self._thought.strip().split("\n")[-n:])
        return rendered(self._console, Text(latest, style="dim italic"))[-n:]

    # -- the answer --------------------------------------------------------------------------------

    @property
    def _height(self) -> int:
        return max(3, self._console.height - 3)

    def _refresh(self) -> None:
        self._fit()
        if self._thought and self._thought_s is None:
            self._draw(self._thinking())
            return
        self._print_text()
        if self._text:
            lines = self._lines(self._text)
            overflow = len(lines) - self._height
            if overflow > self._n_lines:
                scrolled = self._rest(lines[:overflow])
                self._print(scrolled)
                self._printed += scrolled
                self._n_lines, self._n_chars = overflow, 0
            rest = self._rest(lines)
            self._draw(rest, n_answer=len(rest))

    def _print_text(self, *, final: bool = False) -> None:
        """Prints the complete blocks."""
        if not self._settings.markdown:
            blocks, rest = _finished_lines(self._text)
        else:
            blocks, rest = split(self._text)
        if final:
            blocks, rest = [*blocks, rest], ""
        for block in blocks:
            lines = self._rest(self._lines(block))
            self._begin_block()
            if lines:
                self._print(lines)
                self._has_gap = True
        if blocks:
            self._text = rest

    def _lines(self, block: str) -> list[Line]:
        """A block's lines, with an empty line before it if there is text above."""
        lines = self._laid_out(block)
        width = self._console.width
        if self._width is None or self._width <= width:
            return lines
        return [part for line in lines for part in rendered(self._console, text_of(line))]

    def _laid_out(self, block: str) -> list[Line]:
        if not self._settings.markdown:
            return rendered(self._console, Text(block), self._width) if block else []
        if not block.strip():
            return []
        lines = rendered(self._console, Markdown(block), self._width)
        while lines and not lines[-1]:
            lines.pop()
        while lines and not lines[0]:
            lines.pop(0)
        return [[], *lines] if self._has_gap else lines

    def _rest(self, lines: list[Line]) -> list[Line]:
        """The lines of a block that are not printed yet."""
        rest = lines[self._n_lines :]
        if rest and self._n_chars:
            rest[0] = without(rest[0], self._n_chars)
        return rest

    def _print(self, lines: Sequence[Line]) -> None:
        """Prints lines above the area that is redrawn."""
        self._live.update(Text(""), refresh=True)  # removes what was drawn last
        self._rows, self._n_answer_rows = [[]], 0
        self._console.print(_segments(lines), end="")

    def _draw(self, rows: list[Line], *, n_answer: int = 0) -> None:
        """Redraws the rows; the first `n_answer` of them belong to the answer."""
        if self._n:
            seconds = perf_counter() - self._begun
            status = Text(f"{self._n} tokens, {seconds:.0f} s; Ctrl-C stops", style="dim")
            rows = [*rows, *rendered(self._console, status)]
        self._live.update(_segments(rows), refresh=True)
        self._rows, self._n_answer_rows = rows, n_answer

    # -- changes of the window's size --------------------------------------------------------------

    def _fit(self) -> None:
        """Adapts to a new size of the window.

        In a narrower window, terminals wrap or cut long rows; in a lower one, the first rows scroll
        out of reach.  So only rows that surely fit one line are redrawn.  The others stay as they
        are.
        """
        if self._console.size == self._size:
            return
        before, self._size = self._width or self._size.width, self._console.size
        n_kept = 0
        for row in reversed(self._rows[-self._size.height :]):
            if Segment.get_line_length(row) > self._size.width:
                break
            n_kept += 1
        self._live._live_render._shape = (self._size.width, n_kept)  # how far the cursor moves up
        n_staying = min(len(self._rows) - n_kept, self._n_answer_rows)
        self._printed += self._rows[:n_staying]
        self._find_rest(before)

    def _find_rest(self, before: int) -> None:
        """Finds the rest of the last block in the new layout.

        before: the width of the old layout.
        """
        if not self._printed:
            return
        for width in (None, before):
            self._width = width
            self._n_lines, self._n_chars, is_all = place(self._lines(self._text), self._printed)
            if is_all:
                return


def _finished_lines(text: str) -> tuple[list[str], str]:
    done, newline, rest = text.rpartition("\n")
    return ([done], rest) if newline else ([], text)


def _segments(lines: Sequence[Line]) -> Segments:
    return Segments([segment for line in lines for segment in (*line, Segment.line())])


def harmless(text: str) -> str:
    """Text without control characters, which could control the terminal."""
    return text.translate(_CONTROLS)


_CONTROLS = {n: "\ufffd" for n in (*range(32), *range(0x7F, 0xA0)) if chr(n) not in "\n\t"}


def is_usable() -> bool:
    """True if standard input and output are a terminal that can move its cursor."""
    ends = (sys.stdin, sys.stdout)
    if not all(end is not None and end.isatty() for end in ends):
        return False
    return os.environ.get("TERM", "") not in ("", "dumb", "unknown")
