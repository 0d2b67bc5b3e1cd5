"""`swift-gguf bench` on tiny models: what it writes, resumes, refuses and exits with."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swift_gguf import engine
from swift_gguf.bench.modes import PEERS
from swift_gguf.cli import main
from tests.cli.conftest import COMMAND, assert_one_line_failure
from tests.fixtures.controls import accept_drafts

Cli = Callable[..., subprocess.CompletedProcess[str]]

FEW = ("-c", 512, "-ngl", 0, "-t", 1, "-n", 24)


pytestmark = pytest.mark.usefixtures("profiles")


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", n_layer=6, quant="Q8_0")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "suite.jsonl"
    rows = [
        {"category": "chat", "question_id": 1, "turns": ["hello", "and again?"]},
        {"category": "chat", "question_id": 2, "turns": ["good morning"]},
        {"category": "long", "question_id": 3, "turns": ["many words " * 200]},
        {"category": "code", "question_id": 4, "turns": ["for i in range(3):"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run(cli: Cli, model: Path, suite: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, figure = tmp_path / "run.json", tmp_path / "run.png"
    modes = "auto,layer-skip:3,llama-cpp-python,prompt-lookup"
    done = cli(
        *("bench", model, "--suite", suite, "--modes", modes, "--repeat", 2, "--cold"),
        *("--json", out, "--plot", figure, *FEW),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = read(out)
    assert found["complete"]
    assert found["bit_invariant"]
    assert len(found["left_out"]) == 2  # the long one, twice
    names = ["plain", *modes.split(",")]
    assert list(found["modes"]) == names
    turns = [(r["question_id"], r["turn"]) for r in found["requests"] if r["mode"] == "plain"]
    assert sorted(turns) == sorted([("1", 0), ("1", 1), ("2", 0), ("4", 0)] * 2)
    for name, mode in found["modes"].items():
        everything = mode["total"]
        assert everything["requests"] == 8
        if name not in PEERS:  # llama.cpp's kernels round differently
            assert everything["diverged"] == {"requests": 0, "near_ties": 0}, name
        assert everything["tokens_per_second"] > 0
        assert sorted(mode["categories"]) == ["chat", "code"]
        assert mode["categories"]["chat"]["requests"] == 6
        assert mode["first"]["requests"] == 1
    assert found["modes"]["plain"]["total"]["speedup"] == 1.0
    drafts = found["modes"]["layer-skip:3"]["total"]
    assert drafts["sources"]["layer-skip"]["drafted"] > 0
    assert len(drafts["sources"]["layer-skip"]["accepted_length_histogram"]) <= 4
    assert found["limit"]["total"]["mode"] in ("plain", "layer-skip:3")
    assert found["modes"]["prompt-lookup"]["total"]["sources"]["prompt-lookup"]["drafted"] > 0
    for request in found["requests"]:
        # each pass gives what was accepted, and a token of the target's own
        accepted = sum(source["accepted"] for source in request["sources"].values())
        assert request["cycle_n"] == request["cycles"] + accepted
    assert "2 rows do not fit the context" in done.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_later_turns_cost_what_is_new(cli: Cli, model: Path, tmp_path: Path) -> None:
    """What was said before is in the context of every mode, peers included."""
    suite, out = tmp_path / "chat.jsonl", tmp_path / "run.json"
    suite.write_text(json.dumps({"turns": ["many words " * 20, "and again?"]}))
    cli(
        *("bench", model, "--suite", suite, "--modes", "layer-skip,llama-cpp-python"),
        *("--repeat", 2, "--json", out, *FEW),
    )
    requests = read(out)["requests"]
    first, second = ({r["prompt_n"] for r in requests if r["turn"] == turn} for turn in (0, 1))
    assert len(first) == len(second) == 1  # alike in all modes, and every time
    assert second.pop() < first.pop()


def test_the_limit_is_swept_for(cli: Cli, model: Path, suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    done = cli(
        *("bench", model, "--suite", suite, "--limit", 1, "--category", "code", "--oracle"),
        *("--json", out, *FEW),
    )
    assert done.returncode == 0, done.stderr
    found = read(out)
    assert {"ngram:2", "layer-skip:8", "ngram+layer-skip:4"} <= set(found["modes"])
    limit = found["limit"]["categories"]["code"]
    speedups = {name: mode["total"]["speedup"] for name, mode in found["modes"].items()}
    assert limit["speedup"] == max(v for name, v in speedups.items() if name != "auto")
    assert limit["auto_share"] == pytest.approx(speedups["auto"] / limit["speedup"])
    headers = done.stdout.splitlines()[0]
    assert "best fixed setting" in headers
    assert "ngram" not in headers


def test_a_run_is_resumed(cli: Cli, model: Path, suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    command = ("bench", model, "--suite", suite, "--category", "chat", "--json", out, *FEW)
    assert cli(*command).returncode == 0
    whole = read(out)
    kept = [request for request in whole["requests"] if request["unit"] == 0]
    kept[0]["prompt_s"] = 123.0
    out.write_text(json.dumps({**whole, "requests": kept}))
    assert cli(*command).returncode == 0
    again = read(out)
    assert again["complete"]
    assert again["requests"][: len(kept)] == kept
    assert len(again["requests"]) == len(whole["requests"])

    other = cli(*command, "--repeat", 2)
    assert_one_line_failure(other)
    assert "repeat: 1 there, 2 here" in other.stderr
    assert cli(*command, "--restart", "--repeat", 2).returncode == 0
    assert len(read(out)["requests"]) == 2 * len(whole["requests"])


def test_ctrl_c_keeps_what_is_there(model: Path, suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    command = ["bench", model, "--suite", suite, "--repeat", 100_000, "--json", out, *FEW]
    process = subprocess.Popen(
        [*COMMAND, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not out.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "rows are not measured yet" in stdout
    assert not read(out)["complete"]


@pytest.mark.parametrize(("seed", "temp"), [(1, 0), (2, 0.9)])
def test_a_verification_that_accepts_everything_fails(
    model: Path,
    suite: Path,
    seed: int,
    temp: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The control: without it, a bench that never compares would pass, too."""

    command = ["bench", model, "--suite", suite, "--modes", "layer-skip", *FEW]
    command += ["--temp", temp, "--seed", seed]
    with pytest.raises(SystemExit) as same:
        main([str(argument) for argument in command])
    assert not same.value.code
    monkeypatch.setattr(engine, "choose", accept_drafts)
    with pytest.raises(SystemExit) as other:
        main([str(argument) for argument in command])
    assert other.value.code == 1
    assert "a bug" in capsys.readouterr().err


def test_a_sub_network_of_ones_own(cli: Cli, model: Path, suite: Path, tmp_path: Path) -> None:
    """And SWIFT's own search, on the fly."""
    out = tmp_path / "run.json"
    command = ("bench", model, "--suite", suite, "--modes", "layer-skip", "--limit", 1, *FEW)
    for research, shown, searches in (
        (("--skip-ffn", 2, "--draft-tree", "caterpillar"), "as given: without FFN 2", False),
        (("--search", "paper", "--context-window", 8, "--skip-ratio", 0.5), "a first guess", True),
    ):
        done = cli(*command, *research, "--json", out, "--restart")
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout
        (request,) = (r for r in read(out)["requests"] if r["mode"] == "layer-skip")
        assert request["sources"]["layer-skip"]["drafted"] > 0
        assert (request["search_s"] > 0) is searches
    for wrong, words in (("9", "layers 0 to 5"), ("a-b", "3,5-9")):
        done = cli(*command, "--skip-ffn", wrong)
        assert_one_line_failure(done)
        assert words in done.stderr


def test_models_that_cannot_draft(cli: Cli, tiny: Callable[..., Path], suite: Path) -> None:
    done = cli("bench", tiny("mamba"), "--suite", suite, "--category", "chat", *FEW)
    assert done.returncode == 0, done.stderr
    named = cli("bench", tiny("mamba"), "--suite", suite, "--modes", "layer-skip", *FEW)
    assert_one_line_failure(named)


def test_the_built_in_suites(cli: Cli, model: Path) -> None:
    done = cli("bench", model, "--limit", 2, *FEW, "-c", 4096)
    assert done.returncode == 0, done.stderr
    assert "code-editing" in done.stdout
    assert "everyday" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--modes", "fast"), 2, "there is no mode 'fast'"),
        (("--modes", "draft-model"), 2, "needs --draft-model"),
        (("--category", "poems"), 1, "no category poems"),
        (("--suite", "/nowhere.jsonl"), 1, "cannot be read"),
        (("--json", "/nowhere/run.json"), 1, "no folder"),
    ],
)
def test_one_line_for_what_cannot_be(
    arguments: tuple[object, ...], code: int, words: str, cli: Cli, model: Path
) -> None:
    done = cli("bench", model, *arguments, *FEW)
    assert done.returncode == code
    assert words in " ".join(done.stderr.split())
