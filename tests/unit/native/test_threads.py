"""Threads: by cores, and by a container's quota, in trees as Linux shows them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from swift_gguf.native.threads import cpu_list, default_threads, quota_cpus

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux'")

V2 = "30 24 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "33 32 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
MEMORY = "36 32 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def tree(root: Path, *, groups: str, mounts: str, **files: str) -> Path:
    """files: by path below sys/fs/cgroup, with __ for /."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text("23 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


def v2(root: Path, group: str, *, shown: str = "/", **files: str) -> Path:
    """files: cpu.max by folder."""
    return tree(
        root,
        groups=f"0::{group}\n",
        mounts=V2.format(root=shown),
        **{f"{name}cpu.max": content for name, content in files.items()},
    )


def v1(root: Path, group: str, *, shown: str = "/", **files: str) -> Path:
    """files: quota and period by folder."""
    contents = {}
    for name, content in files.items():
        quota, period = content.split()
        folder = f"cpu,cpuacct__{name}"
        contents[f"{folder}cpu.cfs_quota_us"] = quota
        contents[f"{folder}cpu.cfs_period_us"] = period
    return tree(
        root,
        groups=f"8:memory:/\n4:cpu,cpuacct:{group}\n1:name=systemd:/\n0::/\n",
        mounts=MEMORY + V1.format(root=shown),
        **contents,
    )


def test_version_2(tmp_path: Path) -> None:
    assert quota_cpus(v2(tmp_path / "a", "/", **{"": "150000 100000"})) == 1.5
    assert quota_cpus(v2(tmp_path / "b", "/", **{"": "max 100000"})) is None
    assert quota_cpus(v2(tmp_path / "c", "/")) is None  # the topmost group has no such file


def test_the_groups_above_count_too(tmp_path: Path) -> None:
    limits = {"": "max 100000", "pod__": "200000 100000", "pod__app__": "max 100000"}
    assert quota_cpus(v2(tmp_path / "a", "/pod/app", **limits)) == 2
    limits["pod__app__"] = "30000 20000"
    assert quota_cpus(v2(tmp_path / "b", "/pod/app", **limits)) == 1.5
    assert quota_cpus(v2(tmp_path / "c", "/other", **limits)) is None
    v1_limits = {"": "-1 100000", "pod__": "250000 100000", "pod__app__": "-1 100000"}
    assert quota_cpus(v1(tmp_path / "d", "/pod/app", **v1_limits)) == 2.5


def test_version_1(tmp_path: Path) -> None:
    assert quota_cpus(v1(tmp_path / "a", "/", **{"": "50000 100000"})) == 0.5
    assert quota_cpus(v1(tmp_path / "b", "/", **{"": "-1 100000"})) is None


def test_a_container_that_sees_itself_as_the_top(tmp_path: Path) -> None:
    # docker without a namespace of its own: the group's name is the host's, the mount is its own
    named = v1(tmp_path / "a", "/docker/0af", shown="/docker/0af", **{"": "100000 100000"})
    assert quota_cpus(named) == 1
    inner = {"": "400000 100000", "app__": "200000 100000"}
    assert quota_cpus(v1(tmp_path / "b", "/docker/0af/app", shown="/docker/0af", **inner)) == 2
    elsewhere = v2(tmp_path / "c", "/user.slice", shown="/docker/0af", **{"": "300000 100000"})
    assert quota_cpus(elsewhere) == 3


def test_a_system_without_or_with_something_else(tmp_path: Path) -> None:
    assert quota_cpus(tmp_path) is None
    for number, content in enumerate(("", "max", "1 2 3", "x y", "1000 0")):
        assert quota_cpus(v2(tmp_path / str(number), "/", **{"": content})) is None
    odd = tree(tmp_path / "odd", groups="nonsense\n", mounts="nonsense\n")
    assert quota_cpus(odd) is None
    assert default_threads(odd) >= 1


def test_threads_are_no_more_than_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))

    def threads(name: str, limit: str) -> int:
        return default_threads(v2(tmp_path / name, "/", **{"": limit}))

    assert threads("none", "max 100000") == 8
    assert threads("more", "1600000 100000") == 8
    assert threads("down", "390000 100000") == 3
    assert threads("half", "50000 100000") == 1


def test_cores_not_threads_and_fast_ones_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for cpu in range(12):  # 0-7: four fast cores with two threads; 8-11: four slow ones
        pair = f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}" if cpu < 8 else str(cpu)
        path = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(pair + "\n")
    assert default_threads(tmp_path) == 8
    (tmp_path / "sys/devices/cpu_core").mkdir(parents=True)
    (tmp_path / "sys/devices/cpu_core/cpus").write_text("0-7\n")
    assert default_threads(tmp_path) == 4


def test_lists_of_cpus() -> None:
    assert cpu_list("0-3,8\n") == {0, 1, 2, 3, 8}
    assert cpu_list("5") == {5}
    assert cpu_list("\n") == set()
    with pytest.raises(ValueError):
        cpu_list("a-b")


def test_a_real_group() -> None:
    """One process in a group of half a CPU, and in one of one and a half."""
    folder = Path("/sys/fs/cgroup/cpu/swift-gguf-test")
    if not folder.parent.is_dir():
        folder = Path("/sys/fs/cgroup/swift-gguf-test")
    look = "from swift_gguf.native.threads import quota_cpus; print(quota_cpus())"
    enter = f"import os; open({str(folder / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); "
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no group can be made here: {error.strerror}")
    try:
        for cpus in (0.5, 1.5):
            try:
                if (folder / "cpu.max").exists():
                    (folder / "cpu.max").write_text(f"{int(cpus * 1e5)} 100000")
                else:
                    (folder / "cpu.cfs_quota_us").write_text(str(int(cpus * 1e5)))
            except OSError as error:
                pytest.skip(f"no quota can be set here: {error.strerror}")
            done = subprocess.run(
                [sys.executable, "-c", enter + look], capture_output=True, text=True, check=True
            )
            assert float(done.stdout) == cpus
    finally:
        folder.rmdir()
