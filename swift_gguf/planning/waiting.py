"""How long this process' threads waited for a CPU: the sign of a machine that others use, too."""

from __future__ import annotations

import sys
from pathlib import Path

SLICE_S = 0.01
"""About what a thread waits that had to leave its CPU to another."""


def waited_s(tasks: Path = Path("/proc/self/task")) -> float:
    """Seconds that the threads were ready to run and did not, all of them together; only
    differences mean something.

    On Linux the scheduler's own count (proc(5), schedstat; a quota that is used up counts, too).
    Elsewhere by how often a thread had to leave its CPU (getrusage(2)).  The time that threads do
    run tells nothing: those that wait for each other may sleep meanwhile on a quiet machine, too,
    and the load average remembers minutes.
    """
    if sys.platform.startswith("linux"):
        return sum(map(_run_delay_s, tasks.glob("*/schedstat")))
    import resource

    return SLICE_S * resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _run_delay_s(schedstat: Path) -> float:
    try:
        return int(schedstat.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):  # the thread has ended, or the kernel does not count
        return 0.0
