"""Homes that cannot be written, full disks, profiles that are none: answers come anyway."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from swift_gguf.learning.profile import Store
from tests.cli.conftest import COMMAND

FEW = ["-t", "1", "-ngl", "0"]
GENERATE = ["-p", "hello", "-n", "24", "-c", "256", "--temp", "0", *FEW]
PREPARE = ["--tokens", "60", "--tune", "0", "--head", "64", *FEW]


def run(*arguments: object, home: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """A command whose home, caches and profiles are in a folder."""
    unset = ("SWIFT_GGUF_PROFILES", "SWIFT_GGUF_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment | {"HOME": str(home)},
    )


@contextmanager
def mounted(folder: Path, *, size: str) -> Iterator[Path]:
    """A small disk; needs root."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(params=["read-only", "full", "a file", "missing", "no folder"])
def bad_home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param in ("read-only", "full"):
        with mounted(tmp_path / "home", size="64k") as home:
            if request.param == "full":
                fill(home)
            else:
                subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True)
            yield home
    elif request.param == "a file":
        (tmp_path / "home").write_text("not a folder")
        yield tmp_path / "home"
    else:
        yield Path("/proc/nowhere") if request.param == "no folder" else tmp_path / "none"


def fill(folder: Path) -> None:
    """Leaves no byte free."""
    with (folder / "filling").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


@pytest.fixture(scope="module")
def expected(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The answer, where everything is in order."""
    home = tmp_path_factory.mktemp("home")
    return run("generate", tiny("llama", quant="Q8_0"), *GENERATE, home=home).stdout


def test_answers_need_no_home(bad_home: Path, tiny: Callable[..., Path], expected: str) -> None:
    model = tiny("llama", quant="Q8_0")
    done = run("generate", model, *GENERATE, home=bad_home)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    assert "Traceback" not in done.stderr
    talked = run("chat", model, "-n", 8, *FEW, home=bad_home, stdin="hello\n/exit\n")
    assert talked.returncode == 0, talked.stderr
    assert "Traceback" not in talked.stderr


def test_a_sidecar_on_a_full_disk(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """One line and no half file; what was there before is still whole."""
    home = tmp_path / "home"
    home.mkdir()
    with mounted(tmp_path / "disk", size="2m") as disk:
        model = disk / "model.gguf"
        shutil.copy(tiny("llama", quant="Q8_0"), model)
        assert run("prepare", model, *PREPARE, home=home).returncode == 0
        sidecar = disk / "model.swift.gguf"
        before = sidecar.read_bytes()
        fill(disk)
        done = run("prepare", model, *PREPARE, "--width", "1.0", home=home)
        assert done.returncode == 1, done.stderr
        assert done.stderr.splitlines()[-1].startswith("swift-gguf: ")
        assert "Traceback" not in done.stderr
        assert sidecar.read_bytes() == before
        assert {path.name for path in disk.iterdir()} == {"filling", model.name, sidecar.name}


def test_what_a_profile_may_hold(tiny: Callable[..., Path], tmp_path: Path, expected: str) -> None:
    """Whatever lies in its place, the answer is the same, and learning begins anew."""
    model = tiny("llama", quant="Q8_0")
    run("generate", model, *GENERATE, home=tmp_path)
    (profile,) = tmp_path.rglob("profiles/*.json")
    good = json.loads(profile.read_text())
    contents = [
        b"",
        b"[" * 100_000,
        b'{"version": 99999}',
        json.dumps({**good, "costs": "cheap"}).encode(),
        json.dumps({**good, "n_layer": 1e308}).encode(),
        json.dumps({**good, "known": [{"skip_attn": "0-99999999999"}]}).encode(),
        json.dumps({**good, "recycling": [[[0], [1, 2, 3]]] * 3}).encode(),
    ]
    for content in contents:
        profile.write_bytes(content)
        done = run("generate", model, *GENERATE, home=tmp_path)
        assert (done.returncode, done.stdout) == (0, expected), (content[:40], done.stderr)
        assert "Traceback" not in done.stderr
        assert json.loads(profile.read_text())["fingerprint"] == good["fingerprint"]


def test_many_at_once_share_a_profile(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("llama", quant="Q8_0")
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: run("generate", model, *GENERATE, home=tmp_path), range(8)))
    assert {done.returncode for done in runs} == {0}
    assert len({done.stdout for done in runs}) == 1
    (profile,) = tmp_path.rglob("profiles/*.json")
    assert Store(profile.parent).load(profile.stem) is not None
    assert [path.suffix for path in profile.parent.iterdir() if path.suffix != ".lock"] == [".json"]
