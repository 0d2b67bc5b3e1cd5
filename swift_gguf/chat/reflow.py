"""Where the rest of a text begins when it is laid out anew for another width.

Lines break elsewhere then, so that how many were printed says nothing. What stays the same is the
order of characters, blanks apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.segment import Segment
from rich.text import Text

Line = list[Segment]


def place(lines: Sequence[Line], printed: Sequence[Line]) -> tuple[int, int, bool]:
    """How much of `lines` was printed already, in lines that broke elsewhere.

    Returns how many lines, how many characters (blanks not counted) of the next one, and whether
    that is all that was printed; it is not where the layout changes the text itself, as that of
    tables does.
    """
    wanted, i = "".join(map(_letters, printed)), 0
    while wanted and i < len(lines):
        here = _letters(lines[i])
        n = _n_common(here, wanted)
        wanted = wanted[n:]
        if n < len(here):
            return i, n, not wanted
        i += 1
    for line in reversed(printed):  # empty lines at the end
        if _letters(line) or i == len(lines) or _letters(lines[i]):
            break
        i += 1
    return i, 0, not wanted


def without(line: Line, n: int) -> Line:
    """What follows the first `n` characters of a line, blanks not counted."""
    found = re.match(rf"(?:\s*\S){{{n}}}\s*", _text(line))
    cut, rest = found.end() if found else 0, []
    for segment in line:
        if left := segment.text[cut:]:
            rest.append(Segment(left, segment.style))
        cut = max(0, cut - len(segment.text))
    return rest


def text_of(line: Line) -> Text:
    """Something that can be wrapped."""
    return Text.assemble(*((segment.text, segment.style or "") for segment in line))


def _n_common(a: str, b: str) -> int:
    """Characters that both begin with."""
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def _text(line: Line) -> str:
    return "".join(segment.text for segment in line)


def _letters(line: Line) -> str:
    return "".join(_text(line).split())
