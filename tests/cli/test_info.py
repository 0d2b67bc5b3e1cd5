"""`swift-gguf info` and `swift-gguf --version`."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from swift_gguf import __version__
from tests.cli.conftest import assert_one_line_failure

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


# -- costs -----------------------------------------------------------------------------------------


def costs(cli: Cli, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    profiles = str(folder / "profiles")
    return cli("info", *arguments, "--costs", "-t", 1, "-ngl", 0, SWIFT_GGUF_PROFILES=profiles)


def test_costs_are_measured_once(cli: Cli, tiny: Callable[..., Path], tmp_path: Path) -> None:
    first = json.loads(costs(cli, tmp_path, tiny("qwen2"), "--json").stdout)
    found = first["costs"]
    assert re.fullmatch(r"cpu-1t-[0-9a-f]{6}", found["machine"])
    assert found["passes"][0]["width"] == 1
    for item in found["passes"]:
        assert item["ms"] > 0
        assert item["ms_per_token"] == pytest.approx(item["ms"] / item["width"])
    # the parts are the pass, in time and in bytes
    assert [part["name"] for part in found["parts"]] == ["attention", "FFN", "head", "rest"]
    assert sum(part["ms"] for part in found["parts"]) == pytest.approx(found["passes"][0]["ms"])
    n_bytes = sum(part["bytes"] for part in found["parts"])
    assert n_bytes == pytest.approx(first["pass"]["weight_bytes"], rel=0.2)  # and the cache
    assert n_bytes > first["pass"]["weight_bytes"]
    head = found["parts"][2]
    assert head["ms_per_gb"] == pytest.approx(1e9 * head["ms"] / head["bytes"])
    more = {item["name"]: item["ms"] for item in found["more"]}
    assert more["row of logits"] == found["measured"]["row_ms"] >= 0
    assert more["graph switch"] == found["measured"]["switch_ms"] >= 0
    # nothing is measured again: no two measurements are alike
    again = json.loads(costs(cli, tmp_path, tiny("qwen2"), "--json").stdout)
    assert again["costs"] == found


def test_a_table_and_a_plot_of_costs(cli: Cli, tiny: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "costs.svg"
    done = costs(cli, tmp_path, tiny("llama"), "--plot", plot)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("width"))
    rows = [line.split() for line in lines[start + 1 : lines.index("", start)]]
    assert [row[0] for row in rows[:4]] == ["1", "2", "3", "4"]
    slowest = max(rows, key=lambda row: float(row[1]))
    assert set(slowest[4]) == {"#"}
    assert max(len(row[4]) for row in rows) == len(slowest[4]) == 32
    for name in ("attention", "FFN", "head", "rest", "row of logits", "graph switch"):
        assert any(line.startswith(name) for line in lines[start:]), name
    assert done.stdout.isascii()
    assert "nothing learned yet" in done.stdout  # costs alone tell no draft
    assert "<svg" in plot.read_text(encoding="utf-8")


def test_without_costs_nothing_is_measured(
    cli: Cli, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    report = json.loads(
        cli("info", tiny("llama"), "--json", SWIFT_GGUF_PROFILES=str(tmp_path / "none")).stdout
    )
    assert "costs" not in report
    assert not (tmp_path / "none").exists()


def test_no_costs_where_tokens_cannot_be_taken_back(
    cli: Cli, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    done = costs(cli, tmp_path, tiny("mamba"))
    assert_one_line_failure(done)
    assert "cannot measure" in done.stderr


def test_plots_that_cannot_be(cli: Cli, tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert costs(cli, tmp_path, tiny("llama"), "--plot", "costs.docx").returncode == 2
    done = costs(cli, tmp_path, tiny("llama"), "--plot", tmp_path / "no" / "costs.png")
    assert_one_line_failure(done)
    assert not (tmp_path / "profiles").exists()  # nothing was measured for it
