"""Short versions of what `make soak` does at length, each with a control that must fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import soak_cells
import soak_hostile
import soak_lossless
import soak_signals
from swift_gguf import cli
from swift_gguf.errors import SwiftError
from swift_gguf.model.model import Model

SCRIPTS = Path(soak_lossless.__file__).parent


# -- losslessness ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_text_is_changed() -> None:
    told: list[str] = []
    total = soak_lossless.soak(
        seed=11, numbers=range(4), n_requests=12, longest=32, tell=told.append
    )
    assert not told
    assert total["requests"] == 48
    assert total["accepted"] > 20


def test_a_verification_that_accepts_everything_is_noticed() -> None:
    told: list[str] = []
    total = soak_lossless.soak(
        seed=1, numbers=range(3), n_requests=4, control=True, tell=told.append
    )
    assert total["diverged"] == len(told) > 0
    assert told[0].startswith("seed 1 round ")


def test_a_seed_repeats_a_round_to_the_token() -> None:
    """A failure that is told by its numbers alone: with the same numbers, the same failures."""
    told: list[list[str]] = [[], []]
    for run in told:
        soak_lossless.soak(seed=1, numbers=range(5, 6), n_requests=5, control=True, tell=run.append)
    assert told[0] == told[1] != []


def test_cells_stay_as_if_tokens_had_come_one_by_one() -> None:
    told: list[str] = []
    total = soak_cells.soak(seed=3, numbers=range(100), seconds=10, tell=told.append)
    assert not told
    assert total["parked"] > 100
    assert total["interrupted"] > 20


def test_gaps_left_open_are_noticed() -> None:
    told: list[str] = []
    total = soak_cells.soak(seed=1, numbers=range(8), control=True, tell=told.append)
    assert total["wrong"] == len(told) > 0
    assert any("gave other logits" in line for line in told)


def test_what_an_interrupt_leaves_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "_mend", lambda model: None)
    assert soak_cells.soak(seed=6, numbers=range(8), tell=lambda line: None)["wrong"] > 0


# -- hostile files ---------------------------------------------------------------------------------


def hostile(*arguments: str) -> str:
    """The soak in a process of its own: it forks, which a process with threads must not."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "soak_hostile.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_damaged_files() -> None:
    assert " 0 wrong" in hostile("--seed", "5", "--count", "60", "--seconds", "15")


@pytest.mark.slow
def test_damaged_sidecars_and_named_corruptions() -> None:
    said = hostile("--named", "--families", "sidecar,llama", "--count", "0", "--seconds", "20")
    assert " 0 wrong" in said


@pytest.mark.parametrize(
    ("outcome", "what"),
    [
        (soak_hostile.Outcome(0, "", 10), ""),
        (soak_hostile.Outcome(1, "answering\nswift-gguf: no\n", 10), ""),
        (soak_hostile.Outcome(-6, "", 10), "ended with -6"),
        (soak_hostile.Outcome(2, "", 10), "ended with 2"),
        (soak_hostile.Outcome(1, "", 10), "0 lines"),
        (soak_hostile.Outcome(1, "swift-gguf: a\nswift-gguf: b\n", 10), "2 lines"),
        (soak_hostile.Outcome(1, "Traceback ...\nswift-gguf: a", 10), "traceback"),
        (soak_hostile.Outcome(0, "", 1 << 30), "MiB"),
    ],
)
def test_what_counts_as_wrong(outcome: soak_hostile.Outcome, what: str) -> None:
    complaint = outcome.complaint(limit=1 << 20)
    assert what in complaint
    assert bool(complaint) == bool(what)


# -- Ctrl-C ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_at_any_moment() -> None:
    told: list[str] = []
    names = ["generate", "chat in a terminal", "tune in a terminal", "prepare", "models pull"]
    names += ["completion", "models"]
    ended = soak_signals.soak(seed=3, numbers=range(14), names=names, tell=told.append)
    assert not told
    assert sum(len(endings) for endings in ended.values()) == 14
    assert any(ending.code == 130 for endings in ended.values() for ending in endings)


@pytest.mark.parametrize("is_interrupt", [True, False])
def test_interrupts_that_became_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_interrupt: bool
) -> None:
    """As while torch is imported, under `except Exception`."""

    def fail(*_: object, **__: object) -> None:
        try:
            try:
                raise KeyboardInterrupt if is_interrupt else OSError
            except BaseException as error:
                raise ImportError("initialization failed") from error
        except ImportError as error:
            raise SwiftError("it cannot be loaded") from error

    monkeypatch.setattr(cli.root, "main", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == (130 if is_interrupt else 1)
    assert ("cannot be loaded" in capsys.readouterr().err) != is_interrupt


def test_what_an_interrupt_must_not_leave(tmp_path: Path) -> None:
    scene = soak_signals.SCENES["generate"]
    fine = soak_signals.Ending(130, 0.1, "")
    assert soak_signals.complaint(scene, fine, tmp_path) == ""
    traceback = 'Traceback\n  File "swift_gguf/cli/__init__.py", line 1, in {}\nKeyboardInterrupt'
    for said, code in (
        ("", 1),
        ("", -11),
        ("Exception ignored in", 130),
        (traceback.format("main"), -2),
        (traceback.format("main"), 1),
    ):
        ending = soak_signals.Ending(code, 0.1, said)
        assert soak_signals.complaint(scene, ending, tmp_path)
    starting = soak_signals.Ending(-2, 0.1, traceback.format("<module>"))
    assert soak_signals.complaint(scene, starting, tmp_path) == ""
    for seconds, what in ((4.9, ""), (5.1, "took 5.1 s to end")):
        slow = soak_signals.Ending(130, seconds, "")
        assert soak_signals.complaint(scene, slow, tmp_path) == what
    (tmp_path / "model.swift.gguf").write_bytes(b"GGUF")
    assert "no whole file" in soak_signals.complaint(scene, fine, tmp_path)
