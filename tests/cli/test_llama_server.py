"""`swift-gguf llama-server`: what the server is told."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from swift_gguf.gguf.identity import profile_key
from swift_gguf.gguf.sidecar import path_beside
from swift_gguf.native.load import find_library
from tests.cli.conftest import assert_one_line_failure
from tests.prepare.test_sidecar import prepared

Cli = Callable[..., subprocess.CompletedProcess[str]]
Tiny = Callable[..., Path]


@pytest.fixture
def lib(tmp_path: Path) -> Path:
    """A folder with a program that says its arguments, a line each."""
    folder = tmp_path / "lib"
    folder.mkdir()
    for file in find_library().glob("*llama.*"):
        (folder / file.name).symlink_to(file)
    program = folder / "llama-server"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    return folder


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_names_the_model_its_profile_and_its_sidecar(
    cli: Cli, tiny: Tiny, profiles: Path, lib: Path, tmp_path: Path
) -> None:
    model = tmp_path / "a model.gguf"
    model.write_bytes(tiny("llama", quant="Q8_0").read_bytes())
    flags = told(cli("llama-server", model, SWIFT_GGUF_LIB_DIR=str(lib)))
    assert flags[: flags.index("--swa-full")] == [
        "--model",
        str(model),
        "--spec-type",
        "swift",
        "--swift-profile",
        str(profiles / f"{profile_key(model, None)}.json"),
        "--swift-sidecar",
        "none",
    ]
    sidecar = prepared(model, path_beside(model))
    flags = told(cli("llama-server", model, SWIFT_GGUF_LIB_DIR=str(lib)))
    assert str(sidecar) in flags
    assert str(profiles / f"{profile_key(model, sidecar)}.json") in flags


def test_a_sidecar_of_another_model_is_said_and_left_out(
    cli: Cli, tiny: Tiny, lib: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(tiny("llama", quant="Q8_0").read_bytes())
    prepared(tiny("llama", quant="Q8_0", seed=5), path_beside(model))
    done = cli("llama-server", model, SWIFT_GGUF_LIB_DIR=str(lib))
    assert "derived from another model" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    flags = told(done)
    assert flags[flags.index("--swift-sidecar") + 1] == "none"


def test_what_the_user_gives_comes_last_and_only_once(cli: Cli, tiny: Tiny, lib: Path) -> None:
    given = ["--", "--spec-type", "swift,ngram-mod", "--swift-profile=x.json", "-np", "4"]
    flags = told(cli("llama-server", tiny("llama"), *given, SWIFT_GGUF_LIB_DIR=str(lib)))
    assert flags[-5:] == given[1:]
    assert flags.count("--spec-type") == 1
    assert not [flag for flag in flags[:-5] if flag.startswith("--swift-profile")]


def test_where_there_is_none_that_is_one_line(cli: Cli, tiny: Tiny, lib: Path) -> None:
    (lib / "llama-server").unlink()
    for arguments in (["llama-server", tiny("llama")], ["config", "--llama-server"]):
        done = cli(*arguments, SWIFT_GGUF_LIB_DIR=str(lib))
        assert_one_line_failure(done)
        assert "make llama-server" in done.stderr


def test_config_prints_its_path(cli: Cli, lib: Path) -> None:
    done = cli("config", "--llama-server", SWIFT_GGUF_LIB_DIR=str(lib))
    assert done.stdout == f"{lib.resolve() / 'llama-server'}\n"
