"""The window's size changes while an answer comes: every word stays, and is there once."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence

import pytest
from rich.console import Console
from rich.segment import Segment

from swift_gguf.chat.markdown import THEME
from swift_gguf.chat.reflow import Line, place, without
from swift_gguf.chat.settings import Settings
from swift_gguf.chat.terminal import Terminal
from swift_gguf.text.thinking import Part
from tests.fixtures.window import Window

N = 60
SIZES = [
    ((40, 8), (60, 8)),
    ((40, 8), (120, 8)),
    ((100, 6), (40, 6)),
    ((50, 16), (50, 7)),
    ((50, 8), (70, 20)),
    ((40, 8), (120, 8), (30, 6), (31, 12)),
]
WORDS = [f"w{i:03d}." for i in range(N)]
ANSWERS = {
    "paragraph": [f"{word} " for word in WORDS],
    "wide characters": [f"{word}漢字 " for word in WORDS],
    "list": [f"- {word} {word}\n" for word in WORDS],
    "fence": ["```python\n", *(f"{word} = 1  # {word}\n" for word in WORDS), "```\n"],
    "long lines in a fence": [
        "```\n",
        *(f"{word} {chr(10) if i % 20 == 19 else ''}" for i, word in enumerate(WORDS)),
        "\n```\n",
    ],
    "quote": ["> ", *(f"{word} " for word in WORDS)],
    "table": ["| a | b |\n|---|---|\n", *(f"| {word} | some words of it |\n" for word in WORDS)],
    "blocks": [f"{word} {chr(10) * 2 if i % 7 == 6 else ''}" for i, word in enumerate(WORDS)],
    "pieces of words": [piece for word in WORDS for piece in (word[:2], word[2:], " ")],
}


def shown(pieces: Sequence[str], sizes: Sequence[tuple[int, int]], settings: Settings) -> str:
    """What is in a window and above it after an answer, in the middle of which it changes."""
    out = io.StringIO()
    columns, lines = sizes[0]
    console = Console(
        file=out, force_terminal=True, width=columns, height=lines, theme=THEME, color_system=None
    )
    window = Window(columns, lines)
    written = 0

    def write() -> None:
        nonlocal written
        window.feed(out.getvalue()[written:].replace("\n", "\r\n"))
        written = len(out.getvalue())

    changes = {len(pieces) * i // len(sizes): size for i, size in enumerate(sizes) if i}
    with Terminal(console).answer(settings) as view:
        for i, piece in enumerate(pieces):
            if size := changes.get(i):
                write()
                console.size = size
                window.resize(columns=size[0], lines=size[1])
            view._next = 0  # type: ignore[attr-defined]  # draw at every piece
            view.feed(piece, [Part(piece)])
    write()
    return str(window.text)


@pytest.mark.parametrize("markdown", [True, False], ids=["markdown", "raw"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", ANSWERS)
def test_every_word_is_there_once(
    kind: str, sizes: Sequence[tuple[int, int]], markdown: bool
) -> None:
    pieces = ANSWERS[kind]
    text = shown(pieces, sizes, Settings(markdown=markdown))
    found = Counter(re.findall(r"w\d{3}\.", "".join(text.split())))
    wanted = Counter(re.findall(r"w\d{3}\.", "".join(pieces)))
    assert not wanted - found, "lost"
    assert not found - wanted, "twice"
    assert "Ctrl-C stops" not in text


def lines(*texts: str) -> list[Line]:
    return [[Segment(part) for part in re.split("(?<= )", text)] if text else [] for text in texts]


def test_the_rest_is_found_by_its_characters() -> None:
    narrow, wide = lines("one two", "three", "four"), lines("one two three", "four")
    assert place(wide, narrow[:1]) == (0, 6, True)
    assert place(wide, narrow[:2]) == (1, 0, True)
    assert place(narrow, wide[:1]) == (2, 0, True)
    assert place(narrow, lines("one two th")) == (1, 2, True)
    assert place(narrow, []) == (0, 0, True)
    assert place(narrow, lines("one", "TWO")) == (0, 3, False)
    # empty lines at the end were printed, too
    block = lines("one", "", "", "two")
    assert place(block, lines("one")) == (1, 0, True)
    assert place(block, lines("one", "")) == (2, 0, True)
    assert place(block, lines("", "one", "", "", "", "")) == (3, 0, True)


def test_the_rest_of_a_line() -> None:
    (line,) = lines("  one two three")
    for n, rest in ((0, "one two three"), (2, "e two three"), (3, "two three"), (11, "")):
        assert "".join(segment.text for segment in without(line, n)) == rest
