"""`swift-gguf config`."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from swift_gguf.native.load import find_library
from tests.cli.conftest import assert_one_line_failure

Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_folders_hold_what_they_are_for(cli: Cli) -> None:
    expected = {
        "--lib-dir": "libggml*",
        "--include-dir": "swift_gguf.h",
        "--cmake-dir": "swift_gguf-config.cmake",
        "--pkgconfig-dir": "swift_gguf.pc",
    }
    for flag, file in expected.items():
        folder = Path(cli("config", flag).stdout.rstrip("\n"))
        assert folder.is_absolute()
        assert list(folder.glob(file)), (flag, folder)


def test_flags_are_one_line_and_everything_a_table(cli: Cli) -> None:
    line = cli("config", "--libs", "--cflags").stdout
    first, *_, last = shlex.split(line)
    assert (first[:2], last) == ("-I", "-lggml-base")
    assert len(line.splitlines()) == 1
    table = cli("config").stdout
    assert len(table.splitlines()) == 6
    assert str(find_library().resolve()) in table


def test_a_library_without_headers_is_said(cli: Cli, tmp_path: Path) -> None:
    lib = tmp_path / "lib"
    lib.mkdir()
    assert_one_line_failure(cli("config", "--libs", SWIFT_GGUF_LIB_DIR=str(lib)))
    for file in find_library().glob("*llama.*"):
        (lib / file.name).symlink_to(file)
    done = cli("config", "--libs", SWIFT_GGUF_LIB_DIR=str(lib))
    assert_one_line_failure(done)
    assert "has no headers" in done.stderr


def test_spaces_are_quoted_for_the_shell(cli: Cli, tmp_path: Path) -> None:
    moved = tmp_path / "a folder"
    shutil.copytree(find_library().parent, moved, ignore=shutil.ignore_patterns("*.py*"))
    done = cli("config", "--cflags", SWIFT_GGUF_LIB_DIR=str(moved / "lib"))
    assert done.stdout == f"'-I{moved.resolve()}/include'\n"


def test_the_profile_of_a_model(cli: Cli, tiny: Callable[..., Path], profiles: Path) -> None:
    model = tiny("llama")
    done = cli("config", "--profile", model)
    assert_one_line_failure(done)
    assert "swift-gguf tune" in done.stderr
    tuned = cli("tune", model, "--minutes", 0.02, "-c", 256, "-t", 1, "-ngl", 0)
    assert tuned.returncode == 0, tuned.stderr
    path = Path(cli("config", "--profile", model).stdout.strip())
    assert path.parent == profiles
    assert path.exists()


def test_the_profile_of_no_model(cli: Cli, tmp_path: Path) -> None:
    assert_one_line_failure(cli("config", "--profile", tmp_path / "missing.gguf"))
