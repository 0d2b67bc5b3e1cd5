"""llama-server as apps start it: a process, its log, and requests."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift_gguf.learning.profile import Profile, Store
from swift_gguf.model import Model
from swift_gguf.planning.measuring import estimated

START_S = 60.0
FINGERPRINT = "0" * 32


class Server:
    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.url, self._log = process, url, log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return str(answer.read().decode())

    def post(self, path: str, **fields: Any) -> dict[str, Any]:
        body = json.dumps(fields).encode()
        request = urllib.request.Request(
            self.url + path, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def complete(self, prompt: str, **fields: Any) -> dict[str, Any]:
        """With the ids of the tokens, and a cache that other requests have not filled."""
        options = {"n_predict": 48, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        return self.post("/completion", prompt=prompt, **(options | fields))


@contextmanager
def serving(binary: Path, model: Path, log: Path, *flags: str) -> Iterator[Server]:
    """Ends with Ctrl-C, so that it saves what it learned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(binary), "-m", str(model), "--port", str(port), "-c", "1024", "-t", "2"]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, *flags], stdout=out, stderr=subprocess.STDOUT)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait(server)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()


def _wait(server: Server) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert server.process.poll() is None, server.log
        try:
            server.get("/health")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    raise AssertionError(server.log)


def where_rows_are_free(model: Model, folder: Path) -> Path:
    """A profile with the costs of a machine where every draft pays, for two threads."""
    costs = replace(estimated(model), pass_ms=((1, 9.0), (2, 9.1), (33, 11.0)), untimed=())
    key = re.sub(r"-\d+t", "-2t", model.machine_key) + "@256"
    store = Store(folder)
    values = {key: costs.as_dict()}
    assert store.add(
        Profile(fingerprint=FINGERPRINT, model="tiny", n_layer=model.n_layer, costs=values)
    )
    return store.path(FINGERPRINT)
