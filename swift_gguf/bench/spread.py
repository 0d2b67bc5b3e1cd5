"""Medians with their spread, and plain-text tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Repeated measurements of one quantity, in its own unit.

    Median and quartiles, because timings have a hard floor and a long tail: one interrupted pass
    changes the mean and the standard deviation, but not these.
    """

    median: float
    q1: float
    q3: float
    min: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ValueError if there are no values."""
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no measurements; ask for at least one round")
        if len(ordered) == 1:
            q1 = q3 = ordered[0]
        else:
            q1, _, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median=statistics.median(ordered), q1=q1, q3=q3, min=ordered[0], n=len(ordered))

    def text(self, digits: int = 2) -> str:
        """``12.34 (12.30-12.51)``: the median and the quartiles around it."""
        return f"{self.median:.{digits}f} ({self.q1:.{digits}f}-{self.q3:.{digits}f})"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a line under the headers; the first column is left-aligned, the others right."""
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]

    def aligned(line: list[str]) -> str:
        first, *others = line
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([aligned(lines[0]), rule, *map(aligned, lines[1:])])
