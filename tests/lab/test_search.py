"""The benchmarks of search and drafting run on a tiny model, end to end; no speed is judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import corpus
from lab.__main__ import main
from swift_gguf.gguf.sidecar import path_beside
from swift_gguf.model import Model, ModelOptions
from swift_gguf.prepare.run import Preparation, PrepareOptions
from swift_gguf.subnetwork import SubNetwork

N_LAYER = 6
Run = Callable[..., tuple[int, dict[str, Any]]]

SKIP = SubNetwork(n_layer=N_LAYER, skip_attn=frozenset({2}), skip_ffn=frozenset({3}))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    rows = [
        {"category": name, "question_id": i, "turns": [f"{name} question {i}?"]}
        for name in ("prose", "code")
        for i in range(4)
    ]
    path = tmp_path / "suite.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(
    tiny: Callable[..., Path], suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Runs an experiment; its exit status and its JSON."""
    monkeypatch.setenv("SWIFT_GGUF_CACHE", str(tmp_path / "cache"))
    path, out = tiny("llama", n_layer=N_LAYER, quant="Q8_0"), tmp_path / "out.json"

    def run_experiment(name: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        common = [str(path), "--suite", str(suite), "--json", str(out), "-t", "1", "-ngl", "0"]
        status = main([name, *common, "--max-prompt", "100", *arguments])
        return status, json.loads(out.read_text()) if out.exists() else {}

    return run_experiment


def test_search(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bayes_opt", reason="the paper's search needs it")
    status, found = run(
        "search", "--prompts", "4", "--tokens", "40", "--seconds", "0.2", "--ratios", "0.3"
    )
    assert status == 0
    assert list(found["runs"]) == ["ours, width free", "ours", "paper, r=0.3"]
    for points in found["runs"].values():
        assert [point["seconds"] for point in points] == pytest.approx(
            [0.2 * (i + 1) / 20 for i in range(20)]
        )
        assert points[-1]["steps"] >= points[0]["steps"] > 0
    held_out = sum(text["answer_n"] for text in found["texts"] if text["held_out"])
    assert {score["positions"] for score in found["scores"]} == {held_out}
    scored = {(score["skip_attn"], score["skip_ffn"]) for score in found["scores"]}
    noted = {(p["skip_attn"], p["skip_ffn"]) for points in found["runs"].values() for p in points}
    assert noted < scored
    for score in found["scores"]:
        assert 0 <= score["low"] <= score["agreement"] <= score["high"] <= 1
    assert 2 <= len(found["estimates"]) <= 8
    assert "own past (paper)" in capsys.readouterr().out


def test_drafting(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(
        "drafting",
        *("--prompts", "2", "--tokens", "24", "--rounds", "2", "--skip-attn", "2"),
        *("--skip-ffn", "3"),
    )
    assert status == 0
    modes = {mode["mode"]: mode for mode in found["modes"]}
    assert len(modes) == 6
    assert modes["plain"]["total_ratio"] == 1
    assert modes["plain"]["mean_length"] == 1
    assert modes["chain of 4"]["drafted_a_cycle"] > 3
    assert {mode["answers"] for mode in modes.values()} == {4}
    assert {mode["diverged"] for mode in modes.values()} == {0}, "Q8_0 is batch-invariant"
    first = [run["mode"] for run in found["runs"]][::6]
    assert first == list(modes)[:4], "the order rotates"
    assert "| plain | 1 |" in capsys.readouterr().out


def test_first(run: Run) -> None:
    status, found = run("first", "--prompts", "2", "--tokens", "20", "--rounds", "2")
    assert status == 0
    modes = [each["mode"] for each in found["runs"]]
    assert len(modes) == 12
    assert modes[1:3] == modes[8:6:-1], "the order changes"
    assert all(each["is_same"] and each["tokens"] == 20 for each in found["runs"])


def test_cold(run: Run) -> None:
    status, found = run("drafting", "--cold", "--prompts", "3", "--tokens", "60")
    assert status == 0
    cold = found["cold"]
    assert len(cold["answers"]) == 3
    assert cold["answers"][-1]["steps"] > 0
    assert 0 < cold["search_s"] < cold["total_s"]
    assert cold["best"] is not None


def test_nothing_known_is_one_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = run("drafting", "--prompts", "2")
    assert status == 1
    assert "run swift-gguf tune first" in capsys.readouterr().err


def test_an_interrupt_keeps_what_is_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lab.search.windows", interrupted)
    status, found = run("search", "--prompts", "2", "--tokens", "20")
    assert status == 130
    assert [text["held_out"] for text in found["texts"]] == [False, True]
    assert found["costs"] is not None
    assert found["scores"] == []


def test_windows_cover_the_answer(
    tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    model = open_model(tiny("llama", n_layer=N_LAYER, quant="Q8_0"), n_threads=1)
    prompt = corpus.Prompt(category="", question_id="1", tokens=tuple(range(5, 25)))
    document = corpus.answer(model, prompt, 40)
    corpus.hold(model, document.tokens)
    whole = SubNetwork(n_layer=N_LAYER)
    cut = corpus.windows(model, document, 16, own_past=False)
    assert sum(window.n for window in cut) == len(document.answer)
    for window in cut:
        assert window.score(whole).agrees.all(), "the target agrees with itself"
    assert not all(window.score(SKIP).agrees.all() for window in cut)


def test_front(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "front.png"
    status, found = run(
        "front", "--prompts", "2", "--tokens", "20", "--rounds", "2", "--plot", str(plot)
    )
    assert status == 0
    assert found["positions"] > 20
    assert len(found["points"]) >= 5
    assert not any(point["uses_sidecar"] for point in found["points"].values())
    assert all(point["cost"] > 0 for point in found["points"].values())
    assert plot.stat().st_size > 1000
    assert "FFNs left out" in capsys.readouterr().out


def test_front_of_a_model_with_a_sidecar(run: Run, tiny: Callable[..., Path]) -> None:
    path = tiny("llama", n_layer=N_LAYER, quant="Q8_0")
    sidecar = path_beside(path)
    options = PrepareOptions(width=1.0, n_head=0, n_tokens=60, answer_tokens=12, kind="Q8_0")
    with Model(path, ModelOptions(n_ctx=256, n_threads=1, n_gpu_layers=0)) as model:
        preparation = Preparation(model, [list(range(5, 25))], options)
        preparation.write(sidecar, list(preparation.answers()))
    try:
        status, found = run(
            "front", "--prompts", "2", "--tokens", "20", "--rounds", "1", "--category", "code"
        )
    finally:
        sidecar.unlink()
    assert status == 0
    assert found["points"]["narrow"]["agreement"] > 0.9  # of full width, but the text was prefilled
    assert found["points"]["every second sub-layer left out (SWIFT's start)"]["agreement"] < 1.0
