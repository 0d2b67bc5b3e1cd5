"""`swift-gguf info` and `swift-gguf --version`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from swift_gguf import __version__

Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_json(cli: Cli, tiny: Callable[..., Path]) -> None:
    report = json.loads(cli("info", tiny("qwen2", n_ctx=512), "--json", "-c", 0).stdout)
    assert report["architecture"] == "qwen2"
    assert report["layers"] == len(report["sublayers"]) == 4
    assert report["context"] == report["context_trained"] == 512
    assert report["rollback_refusal"] is None
    assert len(report["llama_cpp_commit"]) == 40
    shares = [
        layer[kind]["share"] for layer in report["sublayers"] for kind in ("attention", "ffn")
    ]
    head = report["pass"]["head_bytes"] / report["pass"]["weight_bytes"]
    assert all(share > 0 for share in shares)
    assert sum(shares) + head == pytest.approx(1, abs=0.01)


def test_table(cli: Cli, tiny: Callable[..., Path]) -> None:
    for family, expected in {
        "llama": "speculation   possible",
        "apertus": "unshared",
        "mamba": "recurrent",
    }.items():
        done = cli("info", tiny(family))
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        for row in ("architecture", "quantisation", "context", "backend", "llama.cpp", "layer"):
            assert row in done.stdout


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout == f"swift-gguf {__version__}\n"
