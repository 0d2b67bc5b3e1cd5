"""The default number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
"""The root of `proc` and `sys`; tests use another one."""


def default_threads(root: Path = ROOT) -> int:
    """One thread per physical core that this process may use, within its container's CPU quota.

    If there are performance and efficiency cores, only performance cores count.  Decoding is bound
    by memory, so a second hardware thread per core gains nothing.  A slow core delays all others at
    every operation.  More threads than the quota use it up early in each period, and then all of
    them wait.
    """
    cores, quota = _cores(root), quota_cpus(root)
    return max(1, cores if quota is None else min(cores, int(quota)))


def _cores(root: Path) -> int:
    if sys.platform == "darwin":
        for key in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True)
            if done.stdout.strip().isdigit():
                return int(done.stdout)
    if hasattr(os, "sched_getaffinity"):
        cores = set()
        usable = os.sched_getaffinity(0)
        for cpu in usable & (_performance_cpus(root) or usable):
            siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            cores.add(siblings.read_text() if siblings.exists() else str(cpu))
        return len(cores)
    return (os.cpu_count() or 2) // 2


def _performance_cpus(root: Path) -> set[int]:
    """Linux's list of performance cores; empty on processors with only one kind of core."""
    try:
        return cpu_list((root / "sys/devices/cpu_core/cpus").read_text())
    except (OSError, ValueError):
        return set()


def cpu_list(text: str) -> set[int]:
    """Parses a CPU list as Linux writes it: "0-3,8".

    Raises:
        ValueError: the text is not such a list.
    """
    cpus = set[int]()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


# -- a container's share ---------------------------------------------------------------------------


def quota_cpus(root: Path = ROOT) -> float | None:
    """The CPU quota of this process's control groups, in CPUs; None if there is no limit.

    See cgroups(7): `cpu.max` in version 2, `cpu.cfs_quota_us` and `cpu.cfs_period_us` in version 1.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        return min(_quotas(root), default=None)
    except (OSError, ValueError, ArithmeticError):  # no control groups, or an unknown format
        return None


def _quotas(root: Path) -> Iterator[float]:
    groups = _groups((root / "proc/self/cgroup").read_text())
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        shown, mount = map(_unescaped, fields.split()[3:5])
        if kind == "cgroup2" and "" in groups:
            read, group = _quota_v2, groups[""]
        elif kind == "cgroup" and "cpu" in options.split(",") and "cpu" in groups:
            read, group = _quota_v1, groups["cpu"]
        else:
            continue
        top = root / mount.lstrip("/")
        # inside a container, the mount may show the container's own group as its root
        inside = PurePosixPath(group)
        below = inside.relative_to(shown) if inside.is_relative_to(shown) else PurePosixPath()
        for folder in (below, *below.parents):
            if (quota := read(top / folder)) is not None:
                yield quota


def _groups(text: str) -> dict[str, str]:
    """This process's groups from proc/self/cgroup, by controller; "" is that of version 2."""
    groups = dict[str, str]()
    for line in text.splitlines():
        _, controllers, group = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), group)
    return groups


def _unescaped(path: str) -> str:
    """A path from mountinfo, which writes spaces in octal."""
    return path.replace("\\040", " ")


def _quota_v2(folder: Path) -> float | None:
    quota, period = (_read(folder / "cpu.max") or "max 100000").split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    quota, period = (_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def _read(path: Path) -> str:
    """A file's text; empty if there is no file: the topmost group has no limits."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
