"""`lab servers` with two of our own servers, one of which plays stock llama.cpp's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.__main__ import main

pytest.importorskip("fastapi", reason="the packages of the extra `server` are not installed")

ROWS = [
    {"category": name, "question_id": name, "turns": [f"What is {name}?", "not asked"]}
    for name in ("prose", "code")
]
PLAYS_STOCK = """\
import sys
from swift_gguf.cli import main
_, _, model, *flags = sys.argv
sys.argv = ["swift-gguf", "serve", model, *flags, {flags}]
main()
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "suite.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def stock(tmp_path: Path) -> Callable[..., Path]:
    """`stock(*flags)`: a program that takes the flags of llama-server."""

    def write(*flags: str) -> Path:
        path = tmp_path / "llama-server"
        names = ", ".join(map(repr, flags))
        path.write_text(f"#!{sys.executable}\n{PLAYS_STOCK.format(flags=names)}")
        path.chmod(0o755)
        return path

    return write


@pytest.mark.slow
def test_servers_answer_in_turns(
    tiny: Callable[..., Path],
    suite: Path,
    stock: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = tiny("llama", n_ctx=32768, quant="Q8_0"), tmp_path / "out.json"
    arguments = ["servers", str(path), "--suite", str(suite), "--json", str(out), "-t", "1"]
    arguments += ["--tokens", "24", "--stock", str(stock("--speculation", "off"))]
    assert main([*arguments, "--stock-flags", "-c 512"]) == 0
    found = json.loads(out.read_text())
    assert list(found["servers"]) == ["stock", "stock -c 512", "swift-gguf"]
    assert sorted(request["category"] for request in found["requests"]) == ["code", "prose"]
    for request in found["requests"]:
        for answer in request["answers"].values():
            assert answer["prompt_n"] > 10, "no prompt comes from a cache"
            assert 0 < answer["prompt_ms"] + answer["predicted_ms"] <= 1e3 * answer["seconds"]
            assert answer["predicted_n"] == 24
            assert answer["same_text"]
    assert "| 0 of 2 |" in capsys.readouterr().out


@pytest.mark.slow
def test_another_text_is_counted(
    tiny: Callable[..., Path], suite: Path, stock: Callable[..., Path], tmp_path: Path
) -> None:
    path, out = tiny("llama", n_ctx=32768, quant="Q8_0"), tmp_path / "out.json"
    arguments = ["servers", str(path), "--suite", str(suite), "--json", str(out), "-t", "1"]
    arguments += ["--tokens", "24", "--stock", str(stock())]
    other = "--chat-template '{{ messages[0].content }} {{ 1 + 1 }}'"
    assert main([*arguments, f"--stock-flags={other}"]) == 0
    found = json.loads(out.read_text())["summaries"]
    assert found["swift-gguf"]["different_texts"] == 0
    assert found[f"stock {other}"]["different_texts"] == 2


def test_a_server_that_does_not_start_is_one_line(
    tiny: Callable[..., Path], suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    program.chmod(0o755)
    arguments = ["servers", str(tiny("llama")), "--suite", str(suite), "--stock", str(program)]
    assert main(arguments) == 1
    assert "error: a server ended early: no such flag" in capsys.readouterr().err
