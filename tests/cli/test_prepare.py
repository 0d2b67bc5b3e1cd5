"""`swift-gguf prepare`, and what `generate` makes of what it writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, assert_one_line_failure

Cli = Callable[..., subprocess.CompletedProcess[str]]

QUICK = ("--tokens", 200, "--head", 64, "--tune", 0)
LAYER_SKIP = ("-p", "hello", "-n", 12, "--temp", 0, "--json", "--speculation", "layer-skip")


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A model of the test's own, beside which a sidecar may lie."""
    path = tmp_path / "model.gguf"
    shutil.copy(tiny("llama", quant="Q8_0"), path)
    return path


def test_prepare_tunes_and_generate_uses_what_lies_beside_the_model(
    cli: Cli, model: Path, profiles: Path
) -> None:
    done = cli("prepare", model, "--tokens", 200, "--head", 64, "--tune", 0.03, "-ngl", 0)
    assert done.returncode == 0, done.stderr
    sidecar = model.with_name("model.swift.gguf")
    assert f"will write {sidecar}" in done.stderr  # before anything is computed
    assert f"wrote {sidecar}" in done.stdout
    assert "drafts scored" in done.stdout
    assert list(profiles.glob("*.json"))
    assert sorted(model.parent.glob("model*")) == [model, sidecar]

    plain = json.loads(cli("generate", model, *LAYER_SKIP[:-1], "off", "-ngl", 0).stdout)
    narrow = json.loads(cli("generate", model, *LAYER_SKIP, "-ngl", 0).stdout)
    skipping = json.loads(
        cli("generate", model, *LAYER_SKIP, "--sidecar", "none", "-ngl", 0).stdout
    )
    assert narrow["tokens"] == skipping["tokens"] == plain["tokens"]
    assert "the draft head" in narrow["speculation"]["why"]
    assert "draft head" not in skipping["speculation"]["why"]
    learned = json.loads(cli("info", model, "--json", "-ngl", 0).stdout)["learned"]
    assert learned["subnetworks"][0]["draft_head"]
    assert cli("tune", model, "--reset").stdout == "deleted\n"


def test_a_stale_sidecar_is_said_and_left_aside(
    cli: Cli, model: Path, tiny: Callable[..., Path], profiles: Path
) -> None:
    assert cli("prepare", model, *QUICK, "-ngl", 0).returncode == 0
    shutil.copy(tiny("llama", quant="Q8_0", seed=9), model)
    done = cli("generate", model, *LAYER_SKIP, "-ngl", 0)
    assert done.returncode == 0
    assert "draft weights are not used" in done.stderr
    assert "derived from another model" in done.stderr
    beside = model.with_name("model.swift.gguf")
    assert_one_line_failure(cli("generate", model, *LAYER_SKIP, "--sidecar", beside, "-ngl", 0))


def test_an_interrupted_run_goes_on(model: Path, cli: Cli, profiles: Path) -> None:
    command = [*COMMAND, "prepare", str(model), "--tokens", "100000", "--tune", "0", "-ngl", "0"]
    texts = model.with_name("model.swift.gguf.texts.json")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not texts.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    kept = json.loads(texts.read_text())["texts"]
    assert kept
    assert not model.with_name("model.swift.gguf").exists()
    n_tokens = sum(len(prompt) + sum(map(len, answers)) for prompt, answers in kept)
    done = cli("prepare", model, "--tokens", max(1, n_tokens), "--tune", 0, "-ngl", 0)
    assert done.returncode == 0, done.stderr
    assert "answering" not in done.stderr  # there was enough already
    assert not texts.exists()


def test_what_cannot_be_prepared_is_one_line(
    cli: Cli, tiny: Callable[..., Path], model: Path, tmp_path: Path
) -> None:
    assert_one_line_failure(cli("prepare", tiny("qwen3moe"), *QUICK, "-ngl", 0))
    done = cli("prepare", model, *QUICK, "--type", "Q9_9", "-ngl", 0)
    assert done.returncode == 1
    assert "there is no type 'Q9_9'" in done.stderr
    wide = cli("prepare", model, *QUICK, "--rank", 4096, "-ngl", 0)
    assert_one_line_failure(wide)
    assert "give at most 64" in wide.stderr
    missing = cli("prepare", model, *QUICK, "--calibration", tmp_path / "none.txt", "-ngl", 0)
    assert_one_line_failure(missing)
    if os.getuid() != 0:
        done = cli("prepare", model, *QUICK, "-o", "/proc/x.swift.gguf", "-ngl", 0)
        assert done.returncode == 1


def test_columns_that_need_another_type_are_said(cli: Cli, model: Path) -> None:
    done = cli("prepare", model, *QUICK, "--width", 0.5, "--rank", 32, "--type", "Q4_K", "-ngl", 0)
    assert done.returncode == 0, done.stderr
    assert "down columns in Q4_0" in done.stderr.splitlines()[0]


def test_prompts_of_ones_own(cli: Cli, model: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "mine.gguf"
    prompts.write_text("first question\n\nsecond question\n")
    done = cli("prepare", model, "-o", out, "--calibration", prompts, *QUICK, "-ngl", 0)
    assert done.returncode == 0, done.stderr
    done = cli("generate", model, *LAYER_SKIP, "--sidecar", out, "-ngl", 0)
    assert done.returncode == 0, done.stderr
