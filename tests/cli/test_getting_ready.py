"""Before the first prompt: bounded, however busy the machine is, and ended at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.hub.models import resolve
from tests.cli.conftest import COMMAND

ONE_WORD = ["--raw", "-p", "Once", "-n", 1, "-t", 2, "-ngl", 0]


@pytest.fixture
def busy() -> Iterator[None]:
    """Two other programs compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(2)]
    yield
    for other in others:
        other.kill()
        other.wait()


def costs(profiles: Path) -> dict[str, Any]:
    """The one entry."""
    (path,) = profiles.glob("*.json")
    (entry,) = json.loads(path.read_text())["costs"].values()
    return dict(entry)


def cpu_s(arguments: list[object]) -> tuple[float, float]:
    """What a command takes: by the clock, and of CPU time."""
    start, before = time.monotonic(), os.times()
    subprocess.run([*COMMAND, *map(str, arguments)], check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system
    return time.monotonic() - start, used - before.children_user - before.children_system


@pytest.mark.slow
def test_a_busy_machine_is_measured_for_two_seconds_and_again(busy: None, profiles: Path) -> None:
    """By the clock with a generous margin: imports and the load take their time, too."""
    model = resolve("smollm2-135m")
    off_s, off_cpu_s = cpu_s(["generate", model, *ONE_WORD, "--speculation", "off"])
    assert not profiles.exists()
    took_s, took_cpu_s = cpu_s(["generate", model, *ONE_WORD])
    assert took_cpu_s - off_cpu_s < 2 * 2 + 2  # two threads, two seconds
    assert took_s - off_s < 12
    entry = costs(profiles)
    assert entry["is_busy"]
    assert entry["pass_ms"][0][0] == 1


def test_ctrl_c_while_it_measures(profiles: Path) -> None:
    command = [*COMMAND, "generate", resolve("qwen2.5-coder-0.5b"), *ONE_WORD, "-n", "1000"]
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
