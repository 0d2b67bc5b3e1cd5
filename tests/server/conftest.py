"""Servers as people start them: processes of their own, on free ports, with real models."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="the packages of the extra `server` are not installed")

COMMAND = [sys.executable, "-m", "swift_gguf", "serve"]
START_S = 60.0


class Server:
    """A running `swift-gguf serve`."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments), "--port", "0"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.url = self.expect("listening on ").split()[-1]
        except AssertionError:
            self.close()  # nobody else has it yet
            raise
        self.host = urlsplit(self.url).netloc
        name, port = self.host.split(":")
        self.address = (name, int(port))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))

    def expect(self, text: str) -> str:
        """The first line of the log with `text` in it, when it is there."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            ended = self.process.poll() is not None
            for line in list(self.log):
                if text in line:
                    return line
            if ended and not self._reader.is_alive():
                break
            time.sleep(0.01)
        raise AssertionError(f"no {text!r} in {self.log}, exit code {self.process.poll()}")

    def wait_until_ready(self) -> Server:
        self.expect("ready: ")
        return self

    def request(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body.  A body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection(self.host, timeout=60)
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return (
                response.status,
                {k.lower(): v for k, v in response.getheaders()},
                response.read(),
            )
        finally:
            connection.close()

    def post(self, path: str, body: object, **headers: str) -> tuple[int, dict[str, Any]]:
        status, _, answer = self.request("POST", path, body, headers)
        return status, json.loads(answer)

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, Any]]:
        status, _, answer = self.request("GET", path, None, headers)
        return status, json.loads(answer)

    def metric(self, name: str) -> float:
        _, _, text = self.request("GET", "/metrics")
        for line in text.decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")

    def wait_until_idle(self) -> None:
        end = time.monotonic() + 30
        while self.metric("llamacpp:requests_processing"):
            assert time.monotonic() < end, "still answering"
            time.sleep(0.01)

    def terminate(self, number: int = signal.SIGTERM, *, wait_s: float = 60.0) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(wait_s)
        self._reader.join(5)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """`serve(model, *flags)`: a server, ended after the test."""
    servers: list[Server] = []

    def start(*arguments: object, **environment: str) -> Server:
        servers.append(Server(*arguments, **environment))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def model(tiny: Callable[..., Path]) -> Path:
    """Generated, quick, with a long context; it talks nonsense until it is stopped."""
    return tiny("llama", n_ctx=32768, quant="Q8_0")


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[Server]:
    """One for all tests that leave it as it was."""
    running = Server(
        model, "--alias", "tiny", "-c", 4096, "-t", 1, "--cache-ram", 0
    ).wait_until_ready()
    yield running
    code = running.terminate()
    assert code == 0, running.log
    assert not any("Traceback" in line for line in running.log), running.log
