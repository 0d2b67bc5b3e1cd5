"""Finds what is still to be printed after the width of the window has changed.

With another width, lines break at other places, so the number of printed lines is no guide.  The
order of the characters stays the same, except for blanks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.segment import Segment
from rich.text import Text

Line = list[Segment]


def place(lines: Sequence[Line], printed: Sequence[Line]) -> tuple[int, int, bool]:
    """How much of `lines` was already printed as `printed`, with other line breaks.

    Returns the number of complete lines, the number of characters of the next line (without
    blanks), and whether this covers all that was printed.  It does not if the layout changes the
    text itself, as in tables.
    """
    wanted, i = "".join(map(_letters, printed)), 0
    while wanted and i < len(lines):
        here = _letters(lines[i])
        n = _n_common(here, wanted)
        wanted = wanted[n:]
        if n < len(here):
            return i, n, not wanted
        i += 1
    for line in reversed(printed):  # count the empty lines at the end
        if _letters(line) or i == len(lines) or _letters(lines[i]):
            break
        i += 1
    return i, 0, not wanted


def without(line: Line, n: int) -> Line:
    """A line without its first `n` characters; blanks do not count."""
    found = re.match(rf"(?:\s*\S){{{n}}}\s*", _text(line))
    cut, rest = found.end() if found else 0, []
    for segment in line:
        if left := segment.text[cut:]:
            rest.append(Segment(left, segment.style))
        cut = max(0, cut - len(segment.text))
    return rest


def text_of(line: Line) -> Text:
    """A line as a `Text`, which can be wrapped."""
    return Text.assemble(*((segment.text, segment.style or "") for segment in line))


def _n_common(a: str, b: str) -> int:
    """Length of the common prefix."""
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def _text(line: Line) -> str:
    return "".join(segment.text for segment in line)


def _letters(line: Line) -> str:
    return "".join(_text(line).split())
