"""Damaged and foreign files: exit code 1, one line, never a crash."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cli.conftest import assert_one_line_failure
from tests.fixtures.corrupt import bit_flips, damage
from tests.fixtures.parts import as_in_a_cache, write_parts

Cli = Callable[..., subprocess.CompletedProcess[str]]


def generate(cli: Cli, path: Path) -> subprocess.CompletedProcess[str]:
    return cli("generate", path, "-p", "hello", "-n", 4, "-c", 128, "-ngl", 0)


def refused(cli: Cli, paths: list[Path]) -> int:
    """How many files are refused, each in one line; the others (harmless damage) must run."""
    count = 0
    with ThreadPoolExecutor(2) as pool:
        for path, done in zip(paths, pool.map(lambda p: generate(cli, p), paths), strict=True):
            print(path.name, done.returncode, done.stderr.strip())
            if done.returncode != 0:
                assert_one_line_failure(done)
                count += 1
    return count


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_every_kind_of_damage(
    cli: Cli, tiny: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    for name, content in damage(tiny(family).read_bytes()).items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
    paths = sorted(tmp_path.glob("*.gguf"))
    assert refused(cli, paths) > 30


@pytest.mark.slow
def test_flipped_bits(cli: Cli, tiny: Callable[..., Path], tmp_path: Path) -> None:
    paths = []
    for i, content in enumerate(bit_flips(tiny("qwen3moe").read_bytes(), count=60, seed=3)):
        paths.append(tmp_path / f"{i}.gguf")
        paths[-1].write_bytes(content)
    assert refused(cli, paths) > 10


def test_not_a_model(cli: Cli, tiny: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "notes.gguf"
    text.write_text("just some text, long enough to hold a header" * 10)
    no_tokenizer = tiny("llama", tokenizer=False)
    unreadable = {
        tmp_path: "folder|directory",
        tmp_path / "missing.gguf": "no such file",
        text: "not a GGUF",
        no_tokenizer: "tokenizer",
    }
    for path, message in unreadable.items():
        for command in ("generate", "info"):
            prompt = ["-p", "hello"] if command == "generate" else []
            done = cli(command, path, *prompt)
            assert_one_line_failure(done)
            assert re.search(message, done.stderr), done.stderr


def test_a_model_in_parts(cli: Cli, tmp_path: Path) -> None:
    first, second = write_parts(tmp_path)
    done = generate(cli, second)
    assert_one_line_failure(done)
    assert f"part 2 of 2 of a model; name the first, {first.name}" in done.stderr
    as_in_a_cache([first, second])
    asked = ["-p", "hello", "-n", 8, "-c", 128, "--temp", 0, "--json"]
    answers = [cli("generate", path, *asked) for path in (first, tmp_path / "whole.gguf")]
    tokens = [json.loads(done.stdout)["tokens"] for done in answers]
    assert tokens[0] == tokens[1]
    assert cli("info", first).returncode == 0
    done = generate(cli, first.resolve())
    assert_one_line_failure(done)
    assert "found by its name" in done.stderr


def test_an_unknown_name_lists_where_to_look(cli: Cli) -> None:
    done = cli("generate", "smollm3", "-p", "hello")
    assert_one_line_failure(done)
    assert "swift-gguf models" in done.stderr
