"""Compares the speed of stock `llama-server` and `swift-gguf serve` on everyday requests.

Each server is a process of its own with its default settings.  They answer the same requests over
HTTP, greedily, one request at a time and in turns; the order rotates.  A server is stopped while
another one answers, and the caches of prompts are off.  Of a suite's rows the first turn is asked.
We know nothing of the model at the start: the profile is a new one.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

from lab.command import finish, model_parser, positive, tell
from lab.output import markdown
from swift_gguf.bench.subject import Machine, machine
from swift_gguf.bench.suites import load
from swift_gguf.errors import SwiftError
from swift_gguf.gguf.sidecar import path_beside
from swift_gguf.hub import models
from swift_gguf.suite import Row

STOCK = "stock"
OURS = "swift-gguf"
NGRAMS = ("--spec-type ngram-simple", "--spec-type ngram-mod")
NO_CACHE = ("--cache-ram", "0")
START_S = 600.0
ANSWER_S = 3600.0


# -- values ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The `timings` that a server reports for an answer, and our own measurements."""

    prompt_n: int
    prompt_ms: float
    predicted_n: int
    """Includes the first token, which comes from the prompt's pass."""
    predicted_ms: float
    seconds: float
    """From sending the request to the end of the answer."""
    text: str

    @property
    def speed(self) -> float | None:
        """Tokens per second after the first one; None if there are none."""
        return 1e3 * (self.predicted_n - 1) / self.predicted_ms if self.predicted_n > 1 else None


@dataclass(frozen=True, kw_only=True)
class Request:
    """A row's first turn, answered by every server."""

    category: str
    question_id: str
    answers: Mapping[str, Answer]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A server on all requests; speeds are total tokens per total second."""

    answer_tokens_per_second: float
    prompt_tokens_per_second: float
    seconds: float
    """Of all requests, prompts included."""
    ratio: tuple[float, float, float] | None
    """Speed relative to the stock server by request: median, minimum, maximum."""
    different_texts: int
    """Number of answers that differ from the stock server's."""


@dataclass(kw_only=True)
class Report:
    """The results so far; an interrupted run keeps them."""

    model: str
    suites: Sequence[str]
    tokens: int
    machine: Machine
    has_sidecar: bool
    """Our server uses a sidecar beside the model automatically."""
    servers: Mapping[str, Sequence[str]]
    """The flags of each server by name, without the address."""
    requests: list[Request] = field(default_factory=list)

    def summary(self, name: str) -> Summary:
        """Raises ZeroDivisionError if no answer has a second token."""
        answers = [request.answers[name] for request in self.requests]
        stock = [request.answers[STOCK] for request in self.requests]
        ratios = [
            ours.speed / theirs.speed
            for ours, theirs in zip(answers, stock, strict=True)
            if ours.speed and theirs.speed
        ]
        return Summary(
            answer_tokens_per_second=1e3
            * sum(answer.predicted_n - 1 for answer in answers)
            / sum(answer.predicted_ms for answer in answers),
            prompt_tokens_per_second=1e3
            * sum(answer.prompt_n for answer in answers)
            / sum(answer.prompt_ms for answer in answers),
            seconds=sum(answer.seconds for answer in answers),
            ratio=(statistics.median(ratios), min(ratios), max(ratios)) if ratios else None,
            different_texts=sum(
                ours.text != theirs.text for ours, theirs in zip(answers, stock, strict=True)
            ),
        )

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types, without the answers' texts."""
        values = asdict(self)
        for request in values["requests"]:
            texts = {name: answer.pop("text") for name, answer in request["answers"].items()}
            for name, answer in request["answers"].items():
                answer["same_text"] = texts[name] == texts[STOCK]
        if self.requests:
            values["summaries"] = {name: asdict(self.summary(name)) for name in self.servers}
        return values


def render(report: Report) -> str:
    """Markdown."""
    if not report.requests:
        return "no request was answered"
    rows = []
    for name in report.servers:
        found = report.summary(name)
        ratio = "1" if name == STOCK else "-"
        if found.ratio and name != STOCK:
            ratio = "{:.2f} ({:.2f}, {:.2f})".format(*found.ratio)
        rows.append(
            [
                name,
                f"{found.answer_tokens_per_second:.1f}",
                ratio,
                f"{found.prompt_tokens_per_second:.1f}",
                f"{found.seconds:.1f}",
                f"{found.different_texts} of {len(report.requests)}",
            ]
        )
    sidecar = "a sidecar beside it" if report.has_sidecar else "no sidecar"
    title = (
        f"{report.model}, {sidecar}; {', '.join(report.suites)}: {len(report.requests)} requests, "
        f"at most {report.tokens} tokens, greedy; {report.machine.cpu}, {report.machine.cores} "
        f"cores, load before {report.machine.load:.1f}"
    )
    headers = [
        "server",
        "answers, tok/s",
        "against stock, by request: median (least, most)",
        "prompts, tok/s",
        "all requests, s",
        "other texts than stock's",
    ]
    return f"{title}\n\n{markdown(headers, rows)}"


# -- a server --------------------------------------------------------------------------------------


class Server:
    """A process that serves a model, stopped except while it answers.

    command: without the port.

    Raises:
        SwiftError: it ends before it listens.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._url = f"http://127.0.0.1:{_free_port()}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (until `close`)
        self._process = subprocess.Popen(
            [*command, "--port", self._url.rpartition(":")[2]],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=os.environ | environment,
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        end = monotonic() + START_S
        while monotonic() < end:
            if self._process.poll() is not None:
                self._log.seek(0)
                lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
                raise SwiftError(f"a server ended early: {lines[-1] if lines else 'no message'}")
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=10):
                    self._process.send_signal(signal.SIGSTOP)
                    return
            except OSError:  # nobody listens yet, or 503: the model is being loaded
                sleep(0.1)
        raise SwiftError(f"a server has not loaded the model after {START_S:.0f} s")

    def answer(self, text: str, n: int) -> Answer:
        """Asks as a user in a new chat; n: tokens at most.

        Raises:
            SwiftError: the server refuses the request.
        """
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": n,
            "temperature": 0,
            "cache_prompt": False,
        }
        with self.awake():
            start = perf_counter()
            with self.opened(body) as response:
                data = response.read()
            seconds = perf_counter() - start
        values = json.loads(data)
        message, timings = values["choices"][0]["message"], values["timings"]
        return Answer(
            **{name: timings[name] for name in ("prompt_n", "prompt_ms")},
            **{name: timings[name] for name in ("predicted_n", "predicted_ms")},
            seconds=seconds,
            text=(message.get("reasoning_content") or "") + (message["content"] or ""),
        )

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The process runs."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)

    @contextmanager
    def opened(self, body: Mapping[str, Any]) -> Iterator[Any]:
        """The response to a chat completion, of a process that runs.

        Raises:
            SwiftError: the server refuses the request.
        """
        request = urllib.request.Request(
            f"{self._url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
                yield response
        except urllib.error.HTTPError as error:
            raise SwiftError(f"a server answered {error.code}: {error.read()[:500]!r}") from None

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()  # also where it is stopped
        self._process.wait()
        self._log.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -- the measurement -------------------------------------------------------------------------------


def measure(
    servers: Mapping[str, Server],
    rows: Sequence[Row],
    report: Report,
    *,
    progress: Callable[[str], None],
) -> None:
    """Every server answers the first turn of every row; the first row also warms them up."""
    for server in servers.values():
        server.answer(rows[0].turns[0], 8)
    for number, row in enumerate(rows):
        answers = {
            name: servers[name].answer(row.turns[0], report.tokens)
            for name in _rotated(list(servers), number)
        }
        report.requests.append(
            Request(
                category=row.category,
                question_id=row.question_id,
                answers={name: answers[name] for name in servers},
            )
        )
        progress(f"{number + 1} of {len(rows)}: {', '.join(_speeds(answers, list(servers)))}")


def _rotated(names: Sequence[str], by: int) -> list[str]:
    first = by % len(names)
    return [*names[first:], *names[:first]]


def _speeds(answers: Mapping[str, Answer], names: Sequence[str]) -> Iterator[str]:
    for name in names:
        speed = answers[name].speed
        yield f"{name} {speed:.1f}" if speed else f"{name} -"


def main(arguments: Sequence[str]) -> int:
    parser = model_parser("servers", __doc__)
    parser.add_argument(
        "--stock",
        type=Path,
        required=True,
        metavar="FILE",
        help="a llama-server, unpatched, of the commit in native/llama_cpp.pin",
    )
    parser.add_argument(
        "--suite",
        action="append",
        required=True,
        metavar="FILE",
        help="as `swift-gguf bench`; may be repeated",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="rows, a category's in turn; default: all"
    )
    parser.add_argument("--tokens", type=positive, default=96, metavar="N", help="of an answer")
    parser.add_argument(
        "--stock-flags",
        action="append",
        metavar="FLAGS",
        help=f"stock with these flags, too; may be repeated; default: {'; '.join(NGRAMS)}",
    )
    parser.add_argument(
        "--our-flags",
        action="append",
        default=[],
        metavar="FLAGS",
        help="swift-gguf with these flags, too; may be repeated",
    )
    args = parser.parse_args(arguments)
    if not os.access(args.stock, os.X_OK):
        parser.error(f"{args.stock} is no program")
    path = models.resolve(args.model)
    rows = load(args.suite, limit=args.limit)
    common = [] if args.threads is None else ["-t", str(args.threads)]
    common += [] if args.n_gpu_layers < 0 else ["-ngl", str(args.n_gpu_layers)]
    kinds = {
        STOCK: [str(args.stock.resolve()), "-m", str(path)],
        OURS: [sys.executable, "-m", "swift_gguf", "serve", str(path)],
    }
    flags = {STOCK: ""}
    flags |= {
        f"{STOCK} {each}": each
        for each in (NGRAMS if args.stock_flags is None else args.stock_flags)
    }
    flags |= {OURS: ""} | {f"{OURS} {each}": each for each in args.our_flags}
    servers = {name: [*common, *NO_CACHE, *shlex.split(each)] for name, each in flags.items()}
    report = Report(
        model=path.name,
        suites=[Path(suite).name for suite in args.suite],
        tokens=args.tokens,
        machine=machine(),
        has_sidecar=path_beside(path).exists(),
        servers=servers,
    )

    def run() -> None:
        with ExitStack() as stack:
            started = {}
            for name in servers:
                kind = OURS if name.startswith(OURS) else STOCK
                profiles = stack.enter_context(tempfile.TemporaryDirectory())
                environment = {"SWIFT_GGUF_PROFILES": profiles}
                tell(f"starting {name}")
                server = Server([*kinds[kind], *servers[name]], environment)
                stack.callback(server.close)
                started[name] = server
            measure(started, rows, report, progress=tell)

    return finish(args, report, run=run, render=render)
