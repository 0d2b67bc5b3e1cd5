"""The end of a server that is not ready yet: at once, no crash, and nothing is said after it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from swift_gguf.hub.models import resolve
from tests.server.conftest import COMMAND, Server

END_S = 5.0
"""It is below one; on a machine that does other work, some more."""


def end(server: Server, number: int, *, after_s: float) -> tuple[int, list[str]]:
    """Its exit code, and what it says after the signal."""
    time.sleep(after_s)
    said = list(server.log)
    start = time.monotonic()
    code = server.terminate(number)
    assert time.monotonic() - start < END_S
    return code, server.log[len(said) :]


@pytest.mark.parametrize("after_s", [0.0, 0.2, 0.5, 1.0, 1.5])
def test_sigterm_while_it_loads_or_measures(
    serve: Callable[..., Server], tmp_path: Path, after_s: float
) -> None:
    server = serve(resolve("qwen2.5-coder-0.5b"), "-t", 2, SWIFT_GGUF_PROFILES=str(tmp_path))
    code, said = end(server, signal.SIGTERM, after_s=after_s)
    is_ready = any("ready" in line for line in server.log)  # perhaps at the very moment
    assert code == 0
    assert is_ready or not said


def test_a_second_signal_while_it_loads(serve: Callable[..., Server], tmp_path: Path) -> None:
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        server = serve(resolve("smollm2-135m"), "-t", 2, SWIFT_GGUF_PROFILES=str(tmp_path))
        server.process.send_signal(number)
        assert end(server, number, after_s=0.05)[0] == code
        assert "Traceback" not in "\n".join(server.log)


def test_sigterm_before_it_listens(tmp_path: Path, model: Path) -> None:
    """While Python still imports what it needs."""
    for after_s in (0.4, 0.8):
        process = subprocess.Popen(
            [*COMMAND, str(model), "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"SWIFT_GGUF_PROFILES": str(tmp_path)},
        )
        time.sleep(after_s)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[1]
        assert "Traceback" not in said
        # before our first line runs, the signal is the system's
        assert process.returncode in (0, -signal.SIGTERM)
