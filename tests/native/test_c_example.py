"""The C program in native/examples builds against the installed library and drafts."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import source

from swift_gguf.native import find_library
from tests.native.conftest import ROOT


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler
    folder = tmp_path_factory.mktemp("example")
    pin = source.read_pin()
    source.unpack(source.fetch_sdist(pin), folder / "llama.cpp", pin.version)
    includes = ["native/include", folder / "llama.cpp/include", folder / "llama.cpp/ggml/include"]
    lib = find_library()
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    command += [f"-I{ROOT / include}" for include in includes]
    command += [str(ROOT / "native/examples/draft.c"), "-o", str(folder / "draft")]
    command += [f"-L{lib}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{lib}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "draft"


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)


def test_drafts_that_cannot_miss_are_all_accepted(program: Path, tiny: Callable[..., Path]) -> None:
    """FFN 1 and 3, which the program leaves out of four layers, add nothing in this model."""
    done = run(program, tiny("llama", noop_ffn=(1, 3)), "hello", 64)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    figures = re.search(r"drafted (\d+), accepted (\d+)", done.stderr)
    assert figures, done.stderr
    drafted, accepted = map(int, figures.groups())
    assert drafted == accepted > 0


def test_failures_are_one_line(program: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    for arguments in ((tmp_path / "missing.gguf", "x"), (tiny("mamba"), "x")):
        done = run(program, *arguments)
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
