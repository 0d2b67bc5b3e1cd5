#!/usr/bin/env python3
"""Many rude clients against `swift-gguf serve`, for minutes: what is lost, what leaks, who waits?

    scripts/soak_server.py smollm2-135m --minutes 30 --json soak.json

Clients run in bounded loops on loopback.  They ask and read, ask and leave, read slowly, send what
is no request.  In the middle the server gets SIGTERM and is started again.  The exit code is 1 if
a request that was accepted was neither answered nor told, if there was a 5xx but the promised 503,
if an answer broke off, or if memory grew.

While the server runs, every request is accepted.  When it ends, the system still makes connections
for it that it will never take, and clients cannot tell these from some that it took and dropped:
accepted is then what got the beginning of an answer, or was sent a second before SIGTERM.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

TOLD = (400, 404, 405, 408, 413, 415, 503)
"""HTTP statuses that a client may get."""
ACCEPTED_S = 1.0
"""After this time, the server has read a request."""
WORDS = [
    "the", "a", "cat", "sat", "on", "mat", "and", "saw", "how", "many", "birds", "flew", "over",
    "there", "東京", "é", "🙂", "{}", "[]", "\\", '"',
]  # fmt: skip
LONG = "a " * 30_000
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
WHERE = {"type": "object", "properties": {"at": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": WHERE}}
RUBBISH: list[object] = [
    b"", b"{", b"\xff" * 100, b"[" * 5000, b"null", {}, {"pad": "x" * 100_000},
    {"messages": 3, "prompt": [], "input": "", "content": 3, "tokens": [-1]},
]  # fmt: skip
"""Bodies that every route refuses."""
RUBBISH_OF: dict[str, list[object]] = {
    CHAT: [
        {"messages": []}, {"messages": [{"role": "user", "content": LONG}]},
        HELLO | {"temperature": -1}, HELLO | {"grammar": "root ::= ("},
        HELLO | {"response_format": {"type": "json_schema", "json_schema": {
            "schema": {"type": "nonsense"}}}},
        HELLO | {"tools": [{"function": {"name": "no name"}}]},
    ],
    COMPLETIONS: [{"prompt": LONG}, {"prompt": [[]]}, {"prompt": "a", "suffix": "b"}],
    EMBEDDINGS: [{"input": LONG}, {"input": [10**9]}, {"input": "a", "dimensions": 3}],
    "/tokenize": [{"content": "\ud800"}],
    "/detokenize": [{"tokens": [10**9]}, {"tokens": [1.5]}],
}  # fmt: skip
"""Bodies that this route refuses."""


class Server:
    """`swift-gguf serve` as a process."""

    def __init__(self, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "swift_gguf", "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        self.rss: list[int] = []
        self._told = threading.Event()  # set when the server is ready, or has ended
        self.host = ""
        self.is_ready = False
        self.stopped = math.inf  # when it got SIGTERM
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
        """Records the server's own memory."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return
        if match := re.search(r"VmRSS:\s+(\d+)", status):
            self.rss.append(int(match[1]) << 10)

    @property
    def growth(self) -> float:
        """Growth of memory from the second quarter to the last one; 0: constant."""
        if len(self.rss) < 8:
            return 0.0
        n = len(self.rss) // 4
        return median(self.rss[-n:]) / median(self.rss[n : 2 * n]) - 1

    def stop(self) -> None:
        self.stopped = time.monotonic()
        self.process.send_signal(signal.SIGTERM)


class Call:
    """A request to a server, and whether the server must answer it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._connection = http.client.HTTPConnection(server.host, timeout=300)
        self._sent = math.inf
        self._is_answered = False

    def send(self, method: str, path: str, body: object = None) -> None:
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        self._connection.request(method, path, data, {"Content-Type": "application/json"})
        self._sent = time.monotonic()

    def ask(self, method: str, path: str, body: object = None) -> http.client.HTTPResponse:
        self.send(method, path, body)
        response = self._connection.getresponse()
        self._is_answered = True
        return response

    def close(self) -> None:
        self._connection.close()

    @property
    def was_accepted(self) -> bool:
        """True if a broken connection means a lost answer; see above."""
        is_running = self._server.stopped == math.inf
        return is_running or self._is_answered or self._sent < self._server.stopped - ACCEPTED_S


Deed = Callable[[random.Random, str, Call], None]


@dataclass
class Record:
    """The outcomes of all requests."""

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
        self.servers: list[Server] = []

    @property
    def server(self) -> Server:
        """The current server."""
        return self.servers[-1]

    def run(self) -> None:
        self._start()
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
            self._start()
        except BaseException:
            self.ended.set()  # without a server, the clients must stop
            raise

    def _start(self) -> None:
        self.servers.append(Server(self.arguments))
        self.serving.set()

    def _stop(self) -> None:
        self.server.stop()
        self.serving.clear()
        if code := self.server.process.wait(120):
            self.record.fault(f"the server ended with {code}")
        log = self.server.log
        for i, line in enumerate(log):
            if "Traceback" in line or "Exception" in line:
                self.record.fault("in the server's log: " + " / ".join(log[i : i + 12]))
                break

    def _client(self, rng: random.Random) -> None:
        deeds: list[tuple[Deed, int]] = [
            (self._ask, 5), (self._stream, 6), (self._complete, 4), (self._leave, 5),
            (self._crawl, 1), (self._rubbish, 4), (self._embed, 1), (self._tokenize, 1),
            (self._detokenize, 1), (self._look, 2),
        ]  # fmt: skip
        while not self.ended.is_set():
            if not self.serving.wait(1):
                continue
            deed = rng.choices([deed for deed, _ in deeds], [weight for _, weight in deeds])[0]
            self.attempt(deed, deed.__name__[1:], rng)
            time.sleep(rng.random() * 0.05)

    def attempt(self, deed: Deed, kind: str, rng: random.Random) -> None:
        """Runs one request and records its outcome."""
        call = Call(self.server)
        try:
            deed(rng, kind, call)
        except (OSError, http.client.HTTPException) as error:
            if call.was_accepted:
                self.record.fault(f"{kind}: {type(error).__name__}: {error}")
            self.record.note(kind, "lost" if call.was_accepted else "not accepted")
        finally:
            call.close()

    # -- requests ----------------------------------------------------------------------------------

    def _chat(self, rng: random.Random, **more: object) -> dict[str, Any]:
        words = rng.choices(WORDS, k=rng.choice([3, 10, 60, 200]))
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": " ".join(words)}],
            "max_tokens": rng.choice([1, 4, 16, 64]),
        }
        if rng.random() < 0.2:
            body["response_format"] = {"type": "json_object"}
        elif rng.random() < 0.2:
            body |= {"tools": [TOOL], "tool_choice": rng.choice(["auto", "none", "required"])}
        if rng.random() < 0.2:
            body["stop"] = rng.choices(WORDS, k=2)
        if rng.random() < 0.1:
            body |= {"logprobs": True, "top_logprobs": 3}
        if rng.random() < 0.1:
            body["n"] = 2
        return body | more

    def _ask(self, rng: random.Random, kind: str, call: Call) -> None:
        self._read(kind, call, CHAT, self._chat(rng))

    def _stream(self, rng: random.Random, kind: str, call: Call) -> None:
        self._read(kind, call, CHAT, self._chat(rng, stream=True))

    def _crawl(self, rng: random.Random, kind: str, call: Call) -> None:
        self._read(kind, call, CHAT, self._chat(rng, stream=True), pause_s=0.05)

    def _complete(self, rng: random.Random, kind: str, call: Call) -> None:
        prompts = [" ".join(rng.choices(WORDS, k=9)) for _ in range(rng.choice([1, 1, 2]))]
        body: dict[str, Any] = {"prompt": prompts, "stream": rng.random() < 0.5}
        if rng.random() < 0.2:
            body |= {"logprobs": 2, "n": 2}
        self._read(kind, call, COMPLETIONS, body)

    def _leave(self, rng: random.Random, kind: str, call: Call) -> None:
        call.send("POST", CHAT, self._chat(rng, stream=rng.random() < 0.7))
        time.sleep(rng.random() * 0.3)
        self.record.note(kind, "left")

    def _rubbish(self, rng: random.Random, kind: str, call: Call) -> None:
        path = rng.choice(list(RUBBISH_OF))
        body = rng.choice(RUBBISH + RUBBISH_OF[path])
        response = call.ask("POST", path, body)
        if response.status == 200:
            self.record.fault(f"rubbish was answered by {path}: {str(body)[:80]}")
        self._finish(kind, response)

    def _embed(self, rng: random.Random, kind: str, call: Call) -> None:
        body = {"input": [" ".join(rng.choices(WORDS, k=9)) for _ in range(3)]}
        self._finish(kind, call.ask("POST", EMBEDDINGS, body))

    def _tokenize(self, rng: random.Random, kind: str, call: Call) -> None:
        content = " ".join(rng.choices(WORDS, k=rng.choice([9, 5000])))
        body = {"content": content, "with_pieces": rng.random() < 0.5}
        self._finish(kind, call.ask("POST", "/tokenize", body))

    def _detokenize(self, rng: random.Random, kind: str, call: Call) -> None:
        body = {"tokens": rng.choices(range(256), k=rng.choice([9, 5000]))}
        self._finish(kind, call.ask("POST", "/detokenize", body))

    def _look(self, rng: random.Random, kind: str, call: Call) -> None:
        paths = ["/health", "/metrics", "/props", "/v1/models", "/", "/nowhere"]
        self._finish(kind, call.ask("GET", rng.choice(paths)))

    # -- answers -----------------------------------------------------------------------------------

    def _read(
        self, kind: str, call: Call, path: str, body: dict[str, Any], *, pause_s: float = 0.0
    ) -> None:
        response = call.ask("POST", path, body)
        if response.status != 200 or not body.get("stream"):
            self._finish(kind, response)
            return
        last, timings = "", None
        for line in response:
            time.sleep(pause_s)
            if line.startswith(b"data: "):
                last = line[6:].decode().strip()
                if '"timings"' in last:
                    timings = json.loads(last)["timings"]
        if last == "[DONE]":
            self.record.note(kind, "answered", 200, timings and timings["queue_ms"])
        elif last.startswith('{"error"'):
            self.record.note(kind, "told", 200)
        else:
            self.record.note(kind, "broken", 200)
            self.record.fault(f"{kind}: a stream broke off after {last[:80]!r}")

    def _finish(self, kind: str, response: http.client.HTTPResponse) -> None:
        data = response.read()
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
        for server in soak.servers:
            if server.process.poll() is None:
                server.process.kill()
    found = report(soak)
    text = json.dumps(found, indent=2, ensure_ascii=False)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(text + os.linesep)
    print(text)
    sys.exit(1 if found["n_faults"] else 0)


if __name__ == "__main__":
    main()
