"""`swift-gguf tune`, and what `generate` and `info` make of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND

Cli = Callable[..., subprocess.CompletedProcess[str]]

FEW = ("-c", 512, "-ngl", 0)


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", noop_ffn=(1,), noop_attn=(2,))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "suite.jsonl"
    rows = [{"category": "x", "question_id": i, "turns": [f"hello {i}"]} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_what_tune_finds_generate_uses_and_info_shows(
    cli: Cli, model: Path, suite: Path, profiles: Path
) -> None:
    done = cli("tune", model, "--suite", suite, "--minutes", 0.1, "--json", *FEW)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["evaluations"] > 10
    best = report["best"]
    # to leave out what contributes nothing is free, and nothing else is
    assert set(best["skip_ffn"]) <= {1}
    assert set(best["skip_attn"]) <= {2}
    assert best["skip_ffn"] or best["skip_attn"]
    assert best["agreement"] == 1.0
    assert len(list(profiles.glob("*.json"))) == 1

    learned = json.loads(cli("info", model, "--json", *FEW).stdout)["learned"]
    assert learned["evaluations"] == report["evaluations"]
    assert learned["subnetworks"]
    assert "agreement      skipped" in cli("info", model, *FEW).stdout

    arguments = ("-p", "hello 1", "-n", 60, "--temp", 0, "--json", *FEW)
    drafted = cli("generate", model, *arguments, "--speculation", "layer-skip")
    answer = json.loads(drafted.stdout)
    assert answer["speculation"]["why"].startswith("layer-skip (found by search): without")
    assert answer["speculation"]["sources"]["layer-skip"]["drafted"] > 0
    plain = json.loads(cli("generate", model, *arguments, "--speculation", "off").stdout)
    assert plain["tokens"] == answer["tokens"]
    # and the profile went on growing, or at least kept what it had
    again = json.loads(cli("info", model, "--json", *FEW).stdout)["learned"]
    assert again["evaluations"] >= learned["evaluations"]

    assert cli("tune", model, "--reset").stdout.strip() == "deleted"
    assert json.loads(cli("info", model, "--json", *FEW).stdout)["learned"] is None
    assert "nothing was learned" in cli("tune", model, "--reset").stdout


def test_the_papers_search(cli: Cli, model: Path, suite: Path, profiles: Path) -> None:
    pytest.importorskip("bayes_opt", reason="needs the extra search")
    done = cli(
        *("tune", model, "--suite", suite, "--minutes", 1, "--search", "paper", "--json"),
        *("--skip-ratio", 0.5, "--bayes-interval", 3, "--max-opt-iter", 8, "--max-score", 1, *FEW),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert 8 <= report["evaluations"] <= 9


def _evaluations(profiles: Path) -> int:
    return sum(json.loads(path.read_text())["evaluations"] for path in profiles.glob("*.json"))


def test_ctrl_c_keeps_the_best(tiny: Callable[..., Path], suite: Path, profiles: Path) -> None:
    model = tiny("llama", n_layer=12)  # with four sub-layers the search is done in a second
    arguments = ("tune", model, "--suite", suite, "--minutes", 5, *FEW)
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not _evaluations(profiles):  # it saves as it goes
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "interrupted" in out
    assert "best: without" in out
    assert _evaluations(profiles) > 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--suite", "/nowhere.jsonl"), 1, "cannot be read"),
        (("--minutes", 0), 2, "minutes"),
    ],
)
def test_one_line_for_what_cannot_be(
    arguments: tuple[object, ...], code: int, words: str, cli: Cli, model: Path, profiles: Path
) -> None:
    done = cli("tune", model, *arguments, *FEW)
    assert done.returncode == code
    assert words in done.stderr


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_models_that_cannot_draft(
    family: str, cli: Cli, tiny: Callable[..., Path], profiles: Path
) -> None:
    done = cli("tune", tiny(family), *FEW)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "nothing to tune" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_stops_nothing(
    cli: Cli, model: Path, profiles: Path
) -> None:
    profiles.mkdir(mode=0o500)
    done = cli("generate", model, "-p", "x", "-n", 4, "--temp", 0, *FEW)
    assert done.returncode == 0
