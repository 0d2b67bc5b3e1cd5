"""The first answer of a model that never ran here begins at once, and is ended at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.hub.models import resolve
from tests.cli.conftest import COMMAND

PROMPT = ["--raw", "-p", "Once", "-t", 2, "-ngl", 0]


def costs(profiles: Path) -> list[dict[str, Any]]:
    """Of the one model."""
    (path,) = profiles.glob("*.json")
    return list(json.loads(path.read_text())["costs"].values())


def cpu_s(arguments: list[object]) -> float:
    """The CPU time that a command takes: other programs do not count."""
    before = os.times()
    subprocess.run([*COMMAND, *map(str, arguments)], check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system


@pytest.mark.slow
def test_the_first_token_waits_for_no_measurement(profiles: Path) -> None:
    command = ["generate", resolve("qwen2.5-coder-0.5b"), *PROMPT, "-n", 1]
    off = min(cpu_s([*command, "--speculation", "off"]) for _ in range(3))
    assert not profiles.exists()
    found = []
    for _ in range(3):
        found.append(cpu_s(command))
        assert costs(profiles) == []  # nothing is known, so nothing was timed
    assert min(found) - off < 0.5
    subprocess.run([*COMMAND, *map(str, command[:-1]), "24"], check=True, capture_output=True)
    (learned,) = costs(profiles)
    assert learned["pass_ms"][0][0] == 1
    assert "passes" not in learned["untimed"]
    assert learned["is_provisional"]


def test_ctrl_c_in_the_first_answer(profiles: Path) -> None:
    command = [*COMMAND, "generate", resolve("qwen2.5-coder-0.5b"), *PROMPT, "-n", "1000"]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    time.sleep(2.0)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - start < 5
    assert process.returncode == 130
    assert "Traceback" not in said
