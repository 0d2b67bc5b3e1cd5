"""How many threads to decode with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from swift_gguf.subnetwork import parse_layers


def default_threads() -> int:
    """Physical cores this process may use, performance cores only where there are two kinds.

    Decoding is bound by memory: a second hardware thread a core gains nothing, and one slow core
    holds all others up at every operation.
    """
    if sys.platform == "darwin":
        for key in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True)
            if done.stdout.strip().isdigit():
                return int(done.stdout)
    if hasattr(os, "sched_getaffinity"):
        cores = set()
        for cpu in os.sched_getaffinity(0) & (_performance_cpus() or os.sched_getaffinity(0)):
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            cores.add(siblings.read_text() if siblings.exists() else str(cpu))
        return max(1, len(cores))
    return max(1, (os.cpu_count() or 2) // 2)


def _performance_cpus() -> set[int]:
    """Linux' list of performance cores on processors with two kinds; empty on others."""
    try:
        text = Path("/sys/devices/cpu_core/cpus").read_text()
    except OSError:
        return set()
    return set(parse_layers(text.strip()))
