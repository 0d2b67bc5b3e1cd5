#!/usr/bin/env python3
"""Many rude clients against `swift-gguf serve`, for minutes: what is lost, what leaks, who waits?

    scripts/soak_server.py smollm2-135m --minutes 30 --json soak.json

Clients run in bounded loops on loopback.  They ask and read, ask and leave, read slowly, send what
is no request.  In the middle the server gets SIGTERM and is started again.  The exit code is 1 if
a request that was accepted was neither answered nor told, if there was a 5xx but the promised 503,
if an answer broke off, or if memory grew.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

TOLD = (400, 404, 405, 408, 413, 415, 503)
"""Statuses that clients are promised."""
WORDS = [
    "the",
    "a",
    "cat",
    "sat",
    "on",
    "mat",
    "and",
    "saw",
    "how",
    "many",
    "birds",
    "flew",
    "over",
    "there",
    "東京",
    "é",
    "🙂",
    "{}",
    "[]",
    "\\",
    '"',
]


class Server:
    """`swift-gguf serve` as a process."""

    def __init__(self, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "swift_gguf", "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        self.rss: list[int] = []
        self._told = threading.Event()  # that it is ready, or has ended
        self.host = ""
        self.is_ready = False
        threading.Thread(target=self._read, daemon=True).start()
        if not self._told.wait(300) or not self.is_ready:
            raise SystemExit("the server does not start: " + "\n".join(self.log))

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            if match := re.search(r"listening on http://(\S+)", line):
                self.host = match[1]
            if line.startswith("ready: "):
                self.is_ready = True
                self._told.set()
        self._told.set()

    def sample(self) -> None:
        """Notes the memory that is its own."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return
        if match := re.search(r"VmRSS:\s+(\d+)", status):
            self.rss.append(int(match[1]) << 10)

    @property
    def growth(self) -> float:
        """Of the last quarter's memory over the second quarter's; 0: flat."""
        if len(self.rss) < 8:
            return 0.0
        n = len(self.rss) // 4
        return median(self.rss[-n:]) / median(self.rss[n : 2 * n]) - 1

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@dataclass
class Record:
    """What became of all requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    waits_ms: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, outcome: str, status: int = 0, wait_ms: float | None = None) -> None:
        with self.lock:
            self.outcomes[f"{kind}: {outcome}"] += 1
            if status:
                self.statuses[status] += 1
            if wait_ms is not None:
                self.waits_ms.append(wait_ms)

    def fault(self, text: str) -> None:
        with self.lock:
            self.faults.append(text)


class Soak:
    """The clients and their server."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.record = Record()
        self.serving = threading.Event()  # not between SIGTERM and the next start
        self.ended = threading.Event()
        flags = {"-c": options.ctx_size, "-n": 64, "--queue-size": options.queue_size,
                 "--max-body": 1 << 16, "--receive-timeout": 5, "--cache-ram": 32}  # fmt: skip
        self.arguments = [options.model, *(str(x) for flag in flags.items() for x in flag)]
        self.arguments += options.flags
        self.server = Server(self.arguments)
        self.servers = [self.server]
        self.serving.set()

    def run(self) -> None:
        clients = [
            threading.Thread(target=self._client, args=(random.Random(self.options.seed + i),))
            for i in range(self.options.clients)
        ]
        for client in clients:
            client.start()
        begin, seconds = time.monotonic(), self.options.seconds
        restarted = False
        while time.monotonic() - begin < seconds:
            time.sleep(min(1.0, seconds / 60))
            self.server.sample()
            if self.server.process.poll() is not None:
                self.record.fault("the server has ended: " + " / ".join(self.server.log[-12:]))
                break
            if not restarted and time.monotonic() - begin > seconds / 2:
                restarted = True
                self._restart()
            if sys.stderr.isatty():
                left = seconds - (time.monotonic() - begin)
                print(f"\r{left:6.0f} s left, {self.record.outcomes.total()} requests",
                      end="", file=sys.stderr)  # fmt: skip
        self.ended.set()
        for client in clients:
            client.join(120)
            if client.is_alive():
                self.record.fault("a client waits for an answer that never comes")
                break
        self._stop()

    def _restart(self) -> None:
        self._stop()
        try:
            self.server = Server(self.arguments)
        except BaseException:
            self.ended.set()  # nobody would be there for the clients
            raise
        self.servers.append(self.server)
        self.serving.set()

    def _stop(self) -> None:
        self.serving.clear()
        if code := self.server.stop():
            self.record.fault(f"the server ended with {code}")
        log = self.server.log
        for i, line in enumerate(log):
            if "Traceback" in line or "Exception" in line:
                self.record.fault("in the server's log: " + " / ".join(log[i : i + 12]))
                break

    def _client(self, rng: random.Random) -> None:
        deeds = [
            (self._ask, 6), (self._stream, 8), (self._leave, 5), (self._crawl, 1),
            (self._rubbish, 4), (self._embed, 1), (self._look, 2),
        ]  # fmt: skip
        while not self.ended.is_set():
            if not self.serving.wait(1):
                continue
            deed = rng.choices([deed for deed, _ in deeds], [weight for _, weight in deeds])[0]
            kind = deed.__name__[1:]
            server = self.server
            try:
                deed(rng, kind, server)
            except (OSError, http.client.HTTPException) as error:
                if self.serving.is_set() and server is self.server:
                    self.record.fault(f"{kind}: {type(error).__name__}: {error}")
                self.record.note(kind, "not accepted")  # the server was on its way out
            time.sleep(rng.random() * 0.05)

    # -- deeds -------------------------------------------------------------------------------------

    def _open(
        self, server: Server, method: str, path: str, body: object = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(server.host, timeout=300)
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {"Content-Type": "application/json"})
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def _chat(self, rng: random.Random, **more: object) -> dict[str, Any]:
        words = rng.choices(WORDS, k=rng.choice([3, 10, 60, 200]))
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": " ".join(words)}],
            "max_tokens": rng.choice([1, 4, 16, 64]),
        }
        if rng.random() < 0.2:
            body["response_format"] = {"type": "json_object"}
        if rng.random() < 0.2:
            body["stop"] = rng.choices(WORDS, k=2)
        if rng.random() < 0.1:
            body |= {"logprobs": True, "top_logprobs": 3}
        if rng.random() < 0.1:
            body["n"] = 2
        return body | more

    def _ask(self, rng: random.Random, kind: str, server: Server) -> None:
        connection, response = self._open(server, "POST", "/v1/chat/completions", self._chat(rng))
        self._finish(kind, connection, response)

    def _stream(self, rng: random.Random, kind: str, server: Server, pause_s: float = 0.0) -> None:
        body = self._chat(rng, stream=True)
        connection, response = self._open(server, "POST", "/v1/chat/completions", body)
        if response.status != 200:
            self._finish(kind, connection, response)
            return
        last, timings = "", None
        for line in response:
            time.sleep(pause_s)
            if line.startswith(b"data: "):
                last = line[6:].decode().strip()
                if '"timings"' in last:
                    timings = json.loads(last)["timings"]
        connection.close()
        if last == "[DONE]":
            self.record.note(kind, "answered", 200, timings and timings["queue_ms"])
        elif last.startswith('{"error"'):
            self.record.note(kind, "told", 200)
        else:
            self.record.note(kind, "broken", 200)
            self.record.fault(f"{kind}: a stream broke off after {last[:80]!r}")

    def _crawl(self, rng: random.Random, kind: str, server: Server) -> None:
        self._stream(rng, kind, server, pause_s=0.05)

    def _leave(self, rng: random.Random, kind: str, server: Server) -> None:
        connection = http.client.HTTPConnection(server.host, timeout=300)
        body = json.dumps(self._chat(rng, stream=rng.random() < 0.7)).encode()
        connection.request("POST", "/v1/chat/completions", body,
                           {"Content-Type": "application/json"})  # fmt: skip
        time.sleep(rng.random() * 0.3)
        connection.close()
        self.record.note(kind, "left")

    def _rubbish(self, rng: random.Random, kind: str, server: Server) -> None:
        bodies: list[object] = [
            b"", b"{", b"\xff" * 100, b"[" * 5000, {"messages": []}, {"messages": 3},
            {"messages": [{"role": "user", "content": "x" * 100_000}]},
            {"messages": [{"role": "user", "content": "a " * 30_000}]},
            self._chat(rng, temperature=-1), self._chat(rng, grammar="root ::= ("),
            self._chat(rng, response_format={"type": "json_schema", "json_schema": {
                "schema": {"type": "nonsense"}}}),
        ]  # fmt: skip
        connection, response = self._open(
            server, "POST", "/v1/chat/completions", rng.choice(bodies)
        )
        if response.status == 200:
            self.record.fault("rubbish was answered")
        self._finish(kind, connection, response)

    def _embed(self, rng: random.Random, kind: str, server: Server) -> None:
        body = {"input": [" ".join(rng.choices(WORDS, k=9)) for _ in range(3)]}
        self._finish(kind, *self._open(server, "POST", "/v1/embeddings", body))

    def _look(self, rng: random.Random, kind: str, server: Server) -> None:
        paths = ["/health", "/metrics", "/props", "/v1/models", "/", "/nowhere"]
        self._finish(kind, *self._open(server, "GET", rng.choice(paths)))

    def _finish(
        self, kind: str, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> None:
        data = response.read()
        connection.close()
        if response.status == 200:
            is_answer = b'"timings"' in data
            wait_ms = json.loads(data)["timings"]["queue_ms"] if is_answer else None
            self.record.note(kind, "answered", 200, wait_ms)
            return
        told = response.status in TOLD and "error" in json.loads(data)
        self.record.note(kind, "told" if told else "failed", response.status)
        if not told:
            self.record.fault(f"{kind}: {response.status}: {data[:200]!r}")


def report(soak: Soak) -> dict[str, Any]:
    record, options = soak.record, soak.options
    waits = sorted(record.waits_ms)
    percentiles = quantiles(waits, n=100) if len(waits) > 1 else [0.0] * 99
    growth = [server.growth for server in soak.servers]
    if max(growth) > options.flat:
        record.fault(f"memory grew by {max(growth):.1%}")
    return {
        "seconds": options.seconds,
        "clients": options.clients,
        "requests": record.outcomes.total(),
        "outcomes": dict(sorted(record.outcomes.items())),
        "statuses": dict(sorted(record.statuses.items())),
        "queue_wait_ms": {"p50": percentiles[49], "p99": percentiles[98]},
        "rss_mb": [round(max(server.rss, default=0) / 1e6, 1) for server in soak.servers],
        "memory_growth": [round(part, 4) for part in growth],
        "rss_mb_over_time": [
            [round(rss / 1e6, 1) for rss in server.rss[:: max(1, len(server.rss) // 20)]]
            for server in soak.servers
        ],
        "faults": record.faults[:50],
        "n_faults": len(record.faults),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="What follows -- are flags of swift-gguf serve.",
    )
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--queue-size", type=int, default=40)
    parser.add_argument("--ctx-size", type=int, default=2048)
    parser.add_argument("--flat", type=float, default=0.02, help="memory may grow by this share")
    parser.add_argument("--seed", type=int, default=random.getrandbits(32))
    parser.add_argument("--json", metavar="FILE")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:split])
    options.flags = sys.argv[split + 1 :]
    options.seconds = options.minutes * 60
    print(f"seed {options.seed}", file=sys.stderr)
    soak = Soak(options)
    try:
        soak.run()
    finally:
        if soak.server.process.poll() is None:
            soak.server.process.kill()
    found = report(soak)
    text = json.dumps(found, indent=2, ensure_ascii=False)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(text + os.linesep)
    print(text)
    sys.exit(1 if found["n_faults"] else 0)


if __name__ == "__main__":
    main()
