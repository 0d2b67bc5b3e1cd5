"""Compares three llama-servers on the same requests with 1, 2, 4 and 8 clients: stock, stock with
its n-grams, and ours with --spec-type swift.

The servers run at the same time, and one is awake at a time: they take each batch of requests in
turns, and the order rotates.  A batch has a request for each client; all are sent at once.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from lab.command import finish, model_parser, positive, tell
from lab.output import markdown
from lab.servers import NO_CACHE, STOCK, Server
from swift_gguf.bench.subject import Machine, machine
from swift_gguf.bench.suites import load
from swift_gguf.gguf.sidecar import path_beside
from swift_gguf.hub import models
from swift_gguf.native.load import find_llama_server
from swift_gguf.suite import Row

NGRAMS = f"{STOCK}, n-grams"
OURS = "ours"
CLIENTS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request and what its client saw."""

    category: str
    n_tokens: int
    first_s: float
    """To the first token."""
    seconds: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Requests that were sent at once."""

    clients: int
    seconds: float
    requests: Sequence[Asked]


@dataclass(kw_only=True)
class Report:
    model: str
    suites: Sequence[str]
    tokens: int
    machine: Machine
    has_sidecar: bool
    batches: dict[str, list[Batch]] = field(default_factory=dict)
    """By server; those of all servers have the same requests."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the texts."""
        values = asdict(self)
        for batches in values["batches"].values():
            for batch in batches:
                for request in batch["requests"]:
                    del request["text"]
        return values

    def of(self, server: str, clients: int) -> list[Batch]:
        return [batch for batch in self.batches.get(server, ()) if batch.clients == clients]


def speed(batches: Sequence[Batch]) -> float:
    """Tokens of all clients a second, prompts' time included."""
    n_tokens = sum(asked.n_tokens for batch in batches for asked in batch.requests)
    return n_tokens / sum(batch.seconds for batch in batches)


def _requests(batches: Sequence[Batch]) -> list[Asked]:
    return [asked for batch in batches for asked in batch.requests]


def ratios(ours: Sequence[Batch], stock: Sequence[Batch]) -> dict[str, float]:
    """By category: how many times as long stock took for its requests."""
    seconds: dict[str, list[float]] = {}
    for one, other in zip(_requests(ours), _requests(stock), strict=True):
        both = seconds.setdefault(one.category, [0.0, 0.0])
        both[0] += one.seconds
        both[1] += other.seconds
    return {category: theirs / mine for category, (mine, theirs) in seconds.items()}


def render(report: Report) -> str:
    """Markdown."""
    rows = []
    for clients in CLIENTS:
        stock = report.of(STOCK, clients)
        for name in report.batches:
            batches = report.of(name, clients)
            if not batches or not stock:
                continue
            pairs = list(zip(_requests(batches), _requests(stock), strict=True))
            by_request = [other.seconds / one.seconds for one, other in pairs]
            worst = min(ratios(batches, stock).items(), key=lambda item: item[1])
            rows.append(
                [
                    str(clients),
                    name,
                    f"{speed(batches):.1f}",
                    f"{speed(batches) / speed(stock):.2f}",
                    f"{statistics.median(by_request):.2f}",
                    f"{worst[1]:.2f} ({worst[0]})",
                    f"{statistics.median(one.first_s for one, _ in pairs):.2f}",
                    f"{sum(one.text != other.text for one, other in pairs)} of {len(pairs)}",
                ]
            )
    if not rows:
        return "no request was answered"
    title = (
        f"{report.model}, {'a' if report.has_sidecar else 'no'} sidecar; "
        f"{', '.join(report.suites)}; at most {report.tokens} tokens, greedy; "
        f"{report.machine.cpu}, {report.machine.cores} cores, load before {report.machine.load:.1f}"
    )
    headers = [
        "clients",
        "server",
        "all, tok/s",
        "against stock",
        "by request, median",
        "least kind",
        "first token, s",
        "other texts",
    ]
    return f"{title}\n\n{markdown(headers, rows)}"


def ask(server: Server, row: Row, n: int) -> Asked:
    """Streams an answer, so that the time to its first token is seen."""
    body = {
        "messages": [{"role": "user", "content": row.turns[0]}],
        "max_tokens": n,
        "temperature": 0,
        "cache_prompt": False,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first_s, n_tokens, text = perf_counter(), 0.0, 0, ""
    with server.opened(body) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: ") :])
            for choice in event.get("choices", ()):
                delta = choice["delta"]
                piece = (delta.get("reasoning_content") or "") + (delta.get("content") or "")
                if piece and not text:
                    first_s = perf_counter() - start
                text += piece
            n_tokens = (event.get("usage") or {}).get("completion_tokens", n_tokens)
    seconds = perf_counter() - start
    return Asked(
        category=row.category,
        n_tokens=n_tokens,
        first_s=first_s or seconds,
        seconds=seconds,
        text=text,
    )


def measure(
    servers: Mapping[str, Server],
    rows: Sequence[Row],
    report: Report,
    clients: int,
    *,
    progress: Callable[[str], None],
) -> None:
    """All rows in batches of `clients`; every server takes a batch before the next one begins."""
    names = list(servers)
    for number, at in enumerate(range(0, len(rows), clients)):
        batch = rows[at : at + clients]
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            server = servers[name]
            with server.awake(), ThreadPoolExecutor(len(batch)) as pool:
                start = perf_counter()
                # bound now: the loop goes on only after all have answered
                asked = list(pool.map(lambda row, to=server: ask(to, row, report.tokens), batch))
                seconds = perf_counter() - start
            found = Batch(clients=clients, seconds=seconds, requests=asked)
            report.batches.setdefault(name, []).append(found)
        speeds = (f"{name} {speed(report.of(name, clients)):.1f}" for name in names)
        progress(f"{clients} clients, {at + len(batch)} of {len(rows)}: {', '.join(speeds)}")


def main(arguments: Sequence[str]) -> int:
    parser = model_parser("load", __doc__)
    parser.add_argument("--stock", type=Path, required=True, metavar="FILE",
                        help="a llama-server, unpatched, of the pinned commit")  # fmt: skip
    parser.add_argument("--suite", action="append", required=True, metavar="FILE",
                        help="as `swift-gguf bench`; may be repeated")  # fmt: skip
    parser.add_argument("--limit", type=positive, metavar="N",
                        help="rows, a category's in turn; default: all")  # fmt: skip
    parser.add_argument("--tokens", type=positive, default=96, metavar="N", help="of an answer")
    parser.add_argument("--clients", type=positive, action="append", metavar="N",
                        help=f"may be repeated; default: {CLIENTS}")  # fmt: skip
    parser.add_argument("--ngrams", default="ngram-simple", metavar="TYPE",
                        help="stock's type of speculation, for comparison")  # fmt: skip
    args = parser.parse_args(arguments)
    if not os.access(args.stock, os.X_OK):
        parser.error(f"{args.stock} is no program")
    path = models.resolve(args.model)
    rows = load(args.suite, limit=args.limit)
    report = Report(
        model=path.name,
        suites=[Path(suite).name for suite in args.suite],
        tokens=args.tokens,
        machine=machine(),
        has_sidecar=path_beside(path).exists(),
    )
    common = ["-m", str(path), *NO_CACHE]
    common += [] if args.threads is None else ["-t", str(args.threads)]
    common += [] if args.n_gpu_layers < 0 else ["-ngl", str(args.n_gpu_layers)]

    def run() -> None:
        stock, ours = str(args.stock.resolve()), str(find_llama_server())
        for clients in args.clients or CLIENTS:
            slots = ["-np", str(clients), "-c", str(4096 * clients)]
            with ExitStack() as stack:
                profiles = stack.enter_context(tempfile.TemporaryDirectory())
                profile = ["--swift-profile", f"{profiles}/{'0' * 32}.json"]
                commands = {
                    STOCK: [stock],
                    NGRAMS: [stock, "--spec-type", args.ngrams],
                    OURS: [ours, "--spec-type", "swift", *profile],
                }
                started = {}
                for name, command in commands.items():
                    tell(f"starting {name} for {clients} clients")
                    started[name] = Server([*command, *common, *slots], {})
                    stack.callback(started[name].close)
                    with started[name].awake():
                        ask(started[name], rows[0], 8)  # warms it up
                measure(started, rows, report, clients, progress=tell)

    return finish(args, report, run=run, render=render)
