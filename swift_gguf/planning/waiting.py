"""How long the threads of this process waited for a CPU: tells whether the machine is busy."""

from __future__ import annotations

import sys
from pathlib import Path

SLICE_S = 0.01
"""About how long a thread waits after it was preempted."""


def waited_s(tasks: Path = Path("/proc/self/task")) -> float:
    """Seconds that the threads were ready to run but did not, summed over threads.

    Only differences between two calls mean something.  On Linux the scheduler counts it (proc(5),
    schedstat; an exhausted CPU quota counts too).  Elsewhere it is estimated from the number of
    preemptions (getrusage(2)).  CPU time would not tell: threads that wait for each other may
    sleep on a quiet machine too.  Nor would the load average, which lags by minutes.
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
