"""Medians with their spread, plain-text tables, and what machine it was."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Repeated measurements of one quantity, in its own unit.

    Medians and quartiles, because timings have a hard floor and a long tail: one interrupted pass
    moves a mean and a standard deviation, but neither of these.
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
    """Aligned columns under a rule; the first column to the left, the others to the right."""
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]

    def aligned(line: list[str]) -> str:
        first, *others = line
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([aligned(lines[0]), rule, *map(aligned, lines[1:])])


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a measurement was taken."""

    cpu: str
    cores: int
    """That this process may use."""
    system: str
    load: float
    """Average number of running processes in the minute before; 0 where unknown."""


def machine() -> Machine:
    """This machine; to be called before a measurement, which is a load itself."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return Machine(
        cpu=_cpu_name(),
        cores=cores,
        system=f"{platform.system()} {platform.machine()}",
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    )


def _cpu_name() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
