#!/usr/bin/env python3
"""Record a conversation in a terminal as an animated SVG.

    scripts/record_demo.py qwen2.5-coder-1.5b -o docs/demo.svg

A shell runs in a pseudo-terminal, `swift-gguf chat` in it, and what the screen shows is drawn as it
was at that time: the model, its speed and its words are real.  Only pauses in which nothing
changes are cut to a second, and said to be.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias
from xml.sax.saxutils import escape

import pexpect
import pyte

COLUMNS, ROWS = 80, 22
CELL_W, CELL_H = 8.4, 18  # pixels
MARGIN, BAR = 14, 30
INTERVAL_S = 0.16  # between pictures
LONGEST_PAUSE_S = 1.0
LAST_S = 5.0  # the end stays for that long before it begins anew
TYPING_S = 0.035  # a key

MESSAGES = (
    "Write a Python class Rectangle with area() and perimeter(). Only code.",
    "Rename the class to Box. Print the whole class again.",
    "/show",
)

BACKGROUND, FOREGROUND = "#1a1d24", "#d8dee9"
COLOURS = {
    "black": "#4c566a",
    "red": "#e06c75",
    "green": "#98c379",
    "brown": "#e5c07b",
    "blue": "#61afef",
    "magenta": "#c678dd",
    "cyan": "#56b6c2",
    "white": "#d8dee9",
    "brightblack": "#7f8898",
}

Style: TypeAlias = tuple[str, bool, bool, bool]
"""Colour; bold, italic, underlined."""
Run: TypeAlias = tuple[int, str, Style]
"""Column, text and style."""
Line: TypeAlias = tuple[Run, ...]


@dataclass
class Recording:
    """What the terminal showed, line by line: ``lines[i]`` are line i's contents since a time.

    Lines are counted from the first that there was; ``tops`` says which was the screen's first.
    """

    lines: dict[int, list[tuple[float, Line]]] = field(default_factory=dict)
    tops: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)])
    seconds: float = 0.0
    cut_s: float = 0.0
    """Of pauses."""

    def add(self, screen: pyte.HistoryScreen, since: float) -> None:
        """The screen as it is, `since` seconds after it was added last."""
        top, shown = len(screen.history.top), dict(_lines(screen))
        changed = {
            n: line
            for n, line in shown.items()
            if line != (self.lines[n][-1][1] if n in self.lines else ())
        }
        if not changed and top == self.tops[-1][1]:
            return
        pause = max(0.0, since - LONGEST_PAUSE_S)
        self.cut_s += pause
        self.seconds += since - pause
        for n, line in changed.items():
            self.lines.setdefault(n, []).append((self.seconds, line))
        if top != self.tops[-1][1]:
            self.tops.append((self.seconds, top))


def _lines(screen: pyte.HistoryScreen) -> Iterator[tuple[int, Line]]:
    above = len(screen.history.top)
    for i, line in enumerate(screen.history.top):
        yield i, _runs(line)
    for i in range(screen.lines):
        yield above + i, _runs(screen.buffer[i])


def _runs(cells: dict[int, pyte.screens.Char]) -> Line:
    runs: list[Run] = []
    for column in range(COLUMNS):
        cell = cells[column]
        style = _style(cell)
        if runs and runs[-1][2] == style:
            start, text, _ = runs[-1]
            runs[-1] = (start, text + cell.data, style)
        else:
            runs.append((column, cell.data, style))
    kept = [
        (start + len(text) - len(text.lstrip()), text.strip(), style) for start, text, style in runs
    ]
    return tuple(run for run in kept if run[1])


def _style(cell: pyte.screens.Char) -> Style:
    colour = COLOURS.get(cell.fg, FOREGROUND)
    if re.fullmatch("[0-9a-f]{6}", cell.fg):
        colour = f"#{cell.fg}"
    return colour, cell.bold, cell.italics, cell.underscore and bool(cell.data.strip())


def without_dim(text: str) -> str:
    """Dim text in grey: the emulator knows no dim."""
    return re.sub(r"\x1b\[([\d;]*)m", lambda match: f"\x1b[{_grey(match[1])}m", text)


def _grey(codes: str) -> str:
    kept, rest = [], codes.split(";")
    while rest:
        code = rest.pop(0)
        kept.append("90" if code == "2" else code)
        if code in ("38", "48"):  # a colour of its own: 5;n or 2;r;g;b
            n = 2 if rest[:1] == ["5"] else 4
            kept, rest = kept + rest[:n], rest[n:]
    return ";".join(kept)


# -- driving it ------------------------------------------------------------------------------------


class Screen(pyte.HistoryScreen):
    """Programs ask a terminal where its cursor is: `answer` is told."""

    answer: Callable[[str], object]

    def write_process_input(self, data: str) -> None:
        self.answer(data)


class Session:
    """A shell in a terminal that is recorded."""

    def __init__(self) -> None:
        self.screen = Screen(COLUMNS, ROWS, history=10_000, ratio=0.5)
        self.recording = Recording()
        self._stream = pyte.Stream(self.screen)
        self._shown_at = time.monotonic()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "TERM": "xterm-256color", "PS1": "$ "}
        self._child = pexpect.spawn(
            "sh",
            ["-i"],
            dimensions=(ROWS, COLUMNS),
            env={name: value for name, value in environment.items() if name != "NO_COLOR"},
            encoding="utf-8",
        )
        self._child.delaybeforesend = None
        self.screen.answer = self._child.send

    def watch(self, seconds: float) -> None:
        """Takes pictures for a while."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            try:
                text = self._child.read_nonblocking(65536, timeout=min(0.02, end - now))
                self._stream.feed(without_dim(text))
            except pexpect.TIMEOUT:
                pass
            except pexpect.EOF:
                return
            if time.monotonic() - self._shown_at >= INTERVAL_S:
                self.picture()

    def picture(self) -> None:
        now = time.monotonic()
        before = self.recording.seconds + self.recording.cut_s
        self.recording.add(self.screen, now - self._shown_at)
        if self.recording.seconds + self.recording.cut_s > before:
            self._shown_at = now

    def wait(self, condition: str, *, timeout: float = 180) -> None:
        """Until the screen's last lines say so."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self.watch(INTERVAL_S)
            if re.search(condition, "\n".join(self.screen.display).rstrip()):
                return
        raise SystemExit(f"nothing like {condition!r} on the screen:\n" + self.text)

    def type(self, text: str) -> None:
        """Key by key, as a person would."""
        for key in text:
            self._child.send(key)
            self.watch(TYPING_S)
        self.watch(0.4)
        self._child.send("\r")

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def close(self) -> None:
        self.picture()
        self._child.close(force=True)


def record(model: str, options: Sequence[str], messages: Sequence[str]) -> Recording:
    """A conversation; raises SystemExit where the chat does not come to an end."""
    session = Session()
    try:
        session.wait(r"\$ *$")
        session.type(" ".join(["swift-gguf chat", model, *options]))
        session.wait("a message, or /help")
        for message in messages:
            session.watch(0.8)
            session.type(message)
            session.watch(0.5)
            session.wait("a message, or /help")
        session.watch(1.0)
    finally:
        session.close()
    return session.recording


# -- drawing it ------------------------------------------------------------------------------------


def draw(recording: Recording, title: str) -> str:
    """An SVG that plays the recording again and again; where nothing moves, it shows the end."""
    width, height = round(COLUMNS * CELL_W) + 2 * MARGIN, ROWS * CELL_H + BAR + MARGIN
    total = recording.seconds + LAST_S
    times = ";".join(f"{at / total:.4f}" for at, _ in recording.tops)
    offsets = ";".join(f"0 {-top * CELL_H}" for _, top in recording.tops)
    grey = COLOURS["brightblack"]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            "<style>text{font:14px ui-monospace,SFMono-Regular,Menlo,'DejaVu Sans Mono',monospace;"
            f"fill:{FOREGROUND};white-space:pre}}.b{{font-weight:700}}.i{{font-style:italic}}"
            ".u{text-decoration:underline}</style>",
            f'<rect width="{width}" height="{height}" rx="8" fill="{BACKGROUND}">',
            # all else is timed by this one, which begins anew when it ends
            f'<animate id="m" attributeName="x" to="0" begin="0s;m.end" dur="{total:.2f}s"/>',
            "</rect>",
            f'<text x="{MARGIN}" y="20" style="fill:{grey}">{escape(title)}</text>',
            f'<svg y="{BAR}" width="{width}" height="{ROWS * CELL_H}">',
            f'<g transform="translate(0 {-recording.tops[-1][1] * CELL_H})">',
            '<animateTransform attributeName="transform" type="translate" calcMode="discrete" '
            f'begin="m.begin" dur="{total:.2f}s" keyTimes="{times}" values="{offsets}"/>',
            *(text for n, states in sorted(recording.lines.items()) for text in _texts(n, states)),
            "</g></svg></svg>",
            "",
        ]
    )


def _texts(n: int, states: Sequence[tuple[float, Line]]) -> Iterator[str]:
    """A line's contents, each visible for its time."""
    ends = [begin for begin, _ in states[1:]]
    for (begin, line), end in zip(states, [*ends, None], strict=True):
        if not line:
            continue
        spans = "".join(_span(run) for run in line)
        y = n * CELL_H + 14
        if end is not None:
            timing = f'to="inline" begin="m.begin+{begin:.2f}s" dur="{end - begin:.2f}s"'
            hidden = ' display="none"'
        else:  # the last there was
            timing = f'to="none" begin="m.begin" dur="{max(begin, 0.01):.2f}s"'
            hidden = ""
        yield f'<text y="{y}"{hidden}>{spans}<set attributeName="display" {timing}/></text>'


def _span(run: Run) -> str:
    column, text, (colour, *flags) = run
    names = " ".join(name for name, is_set in zip("biu", flags, strict=True) if is_set)
    attributes = f' class="{names}"' if names else ""
    if colour != FOREGROUND:
        attributes += f' style="fill:{colour}"'
    return f'<tspan x="{MARGIN + column * CELL_W:g}"{attributes}>{escape(text)}</tspan>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="a path, hf:owner/repo[/file.gguf] or a name")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/demo.svg"))
    parser.add_argument("--message", action="append", help="instead of those built in; repeated")
    parser.add_argument("--option", action="append", help="for the chat: --option=--temp=0")
    options = parser.parse_args()
    recording = record(options.model, options.option or ["--temp 0"], options.message or MESSAGES)
    title = "swift-gguf chat"
    if recording.cut_s >= 1:
        title += f" (as it ran, less {recording.cut_s:.0f} s in which nothing moved)"
    options.output.write_text(draw(recording, title), encoding="utf-8")
    n_bytes = options.output.stat().st_size
    print(f"wrote {options.output}: {recording.seconds:.0f} s, {n_bytes / 1000:.0f} kB")


if __name__ == "__main__":
    main()
