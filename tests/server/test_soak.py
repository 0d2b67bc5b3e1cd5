"""Twenty seconds of the soak, and what it must notice; `scripts/soak_server.py` runs it for half an
hour."""

from __future__ import annotations

import argparse
import json
import math
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import soak_server

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak_server.py"


@pytest.mark.slow
def test_soak(model: Path, tmp_path: Path) -> None:
    report = tmp_path / "soak.json"
    # a young process has not seen its peak yet: the half hour holds it to 2 %
    options = ["--minutes", "0.34", "--clients", "30", "--flat", "0.5", "--json", str(report)]
    command = [sys.executable, str(SCRIPT), str(model), *options, "--", "-t", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["requests"] > 100
    assert found["n_faults"] == 0
    for kind in ("ask", "stream", "complete", "embed", "tokenize", "detokenize", "look"):
        assert found["outcomes"][f"{kind}: answered"] > 0
    assert found["outcomes"]["rubbish: told"] > 0
    assert set(found["statuses"]) <= {"200", "400", "404", "408", "413", "415", "503"}


@pytest.mark.parametrize(
    ("said", "stopped_s", "outcome"),
    [
        (b"", math.inf, "lost"),  # no SIGTERM
        (b"", 2.0, "lost"),
        (b"", 0.0, "not accepted"),  # the server may never have had it
        (b"", -1.0, "not accepted"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", 0.0, "lost"),
    ],
)
def test_connections_that_break(said: bytes, stopped_s: float, outcome: str) -> None:
    """stopped_s: SIGTERM came so long after the request."""
    server: Any = SimpleNamespace(stopped=math.inf)

    def drop() -> None:
        connection, _ = listener.accept()
        received = b""
        while not received.endswith(b"{}"):
            received += connection.recv(1 << 16)
        server.stopped = time.monotonic() + stopped_s
        connection.sendall(said)
        time.sleep(0.1)
        reset = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        connection.close()

    options = argparse.Namespace(model="", ctx_size=1, queue_size=1, flags=[])
    soak = soak_server.Soak(options)
    soak.servers.append(server)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server.host = f"127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=drop)
        thread.start()
        soak.attempt(
            lambda _, kind, call: soak._finish(kind, call.ask("POST", "/", {})),
            "ask",
            random.Random(1),
        )
        thread.join()
    assert dict(soak.record.outcomes) == {f"ask: {outcome}": 1}
    assert len(soak.record.faults) == (outcome == "lost")


def test_a_server_that_is_not_there() -> None:
    options = argparse.Namespace(model="", ctx_size=1, queue_size=1, flags=[])
    for stopped, n_faults in ((math.inf, 1), (0.0, 0)):
        soak = soak_server.Soak(options)
        nobody = SimpleNamespace(host="127.0.0.1:1", stopped=stopped)
        soak.servers.append(cast(soak_server.Server, nobody))
        soak.attempt(soak._look, "look", random.Random(1))
        assert len(soak.record.faults) == n_faults
