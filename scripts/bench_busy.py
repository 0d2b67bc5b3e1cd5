#!/usr/bin/env python3
"""Answers beside other programs that compute: stock llama.cpp against us, plainly and with drafts.

Every contender is a process of its own that has its model loaded.  In every round each of them
answers the same prompt, in turns, with 0, 1, 2, ... busy loops beside it.  A figure is the median
of the ratios to the faster one of stock's thread counts in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

from bench_reference import build_reference
from benching import positive

from swift_gguf.bench.spread import table
from swift_gguf.errors import SwiftError
from swift_gguf.hub import models
from swift_gguf.native.load import find_library

PROMPTS = (  # to be continued: answers go on for long
    "Once upon a time there was a lighthouse keeper who found a letter in a bottle. One morning",
    "A bicycle stays upright for several reasons. The first reason is that",
    'def merge(a, b):\n    """Merges two sorted lists into one."""\n    result = []\n',
)
N_CTX = 1024
BUSY_LOOP = "while True: pass"
SETTLE_S = 0.3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a path or a registry name")
    parser.add_argument("--tokens", type=positive, default=48, metavar="N", help="of an answer")
    parser.add_argument("--rounds", type=positive, default=6, metavar="N")
    parser.add_argument("--loops", default="0,1,2", metavar="N,...", help="busy loops beside it")
    parser.add_argument("--stock-lib", type=Path, metavar="DIR", help="default: build it")
    parser.add_argument("--our-lib", type=Path, metavar="DIR", help="default: the package's own")
    parser.add_argument("--before-lib", type=Path, metavar="DIR", help="an older build, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    path = models.resolve(args.model)
    stock_lib = args.stock_lib or build_reference()
    our_lib = args.our_lib or find_library()
    n = cores or 2
    contenders = [
        ("stock -t 1", "stock", 1, stock_lib),
        (f"stock -t {n}", "stock", n, stock_lib),
        (f"plain -t {n}", "plain", n, our_lib),
        (f"auto -t {n}", "auto", n, our_lib),
    ]
    if args.before_lib:
        contenders.append((f"before, plain -t {n}", "plain", n, args.before_lib))
    report: dict[str, Any] = {"model": path.name, "cores": cores, "loops": {}}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(kind, path, n_threads, lib))
            for name, kind, n_threads, lib in contenders
        }
        for worker in workers.values():
            worker.ask(0, 8)
        for loops in map(int, args.loops.split(",")):
            rows: list[dict[str, float]] = []
            with busy(loops):
                for number in range(args.rounds):
                    names = list(workers) if number % 2 else list(workers)[::-1]
                    rows.append(
                        {n: workers[n].ask(number % len(PROMPTS), args.tokens) for n in names}
                    )
            report["loops"][loops] = rows
            print(render(loops, rows, list(workers)), flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def render(loops: int, rows: list[dict[str, float]], names: list[str]) -> str:
    best = [max(speed for name, speed in row.items() if name.startswith("stock")) for row in rows]
    lines = []
    for name in names:
        ratios = sorted(row[name] / b for row, b in zip(rows, best, strict=True))
        lines.append(
            [
                name,
                f"{median(row[name] for row in rows):.1f}",
                f"{median(ratios):.2f}",
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            ]
        )
    head = [f"{loops} busy loops", "tok/s", "of stock's best", "least, most"]
    return table(head, lines) + "\n"


@contextmanager
def busy(n: int) -> Iterator[None]:
    """Programs that compute beside us, for ever."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) for _ in range(n)]
    try:
        sleep(SETTLE_S)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


class Worker:
    """A process with a model; answers prompts."""

    def __init__(self, kind: str, model: Path, n_threads: int, lib: Path) -> None:
        name = "LLAMA_CPP_LIB_PATH" if kind == "stock" else "SWIFT_GGUF_LIB_DIR"
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", kind, str(model), str(n_threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {name: str(lib.resolve())},
        )

    def ask(self, prompt: int, n_tokens: int) -> float:
        """Tokens a second of an answer, prompt processing excluded."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{prompt} {n_tokens}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SwiftError(f"a worker ended with {self._process.wait()}")
        return float(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


# -- a worker's side -------------------------------------------------------------------------------


def serve(kind: str, model: str, n_threads: int) -> None:
    answer = Stock(model, n_threads) if kind == "stock" else Ours(model, n_threads, kind)
    for line in sys.stdin:
        prompt, n_tokens = map(int, line.split())
        print(answer(PROMPTS[prompt], n_tokens), flush=True)


class Stock:
    """llama.cpp's own API, greedy, a token a pass."""

    def __init__(self, model: str, n_threads: int) -> None:
        import llama_cpp

        self._llama = llama_cpp.Llama(
            model, n_ctx=N_CTX, n_threads=n_threads, flash_attn=True, verbose=False
        )

    def __call__(self, text: str, n_tokens: int) -> float:
        """Greedy by C calls alone: `Llama.sample` builds arrays in Python."""
        import llama_cpp as api

        llama = self._llama
        llama.reset()
        llama.eval(llama.tokenize(text.encode()))
        sampler = api.llama_sampler_init_greedy()
        batch = api.llama_batch_init(1, 0, 1)
        try:
            token = api.llama_sampler_sample(sampler, llama.ctx, -1)
            n_past, start = llama.n_tokens, perf_counter()
            for i in range(n_tokens):
                batch.n_tokens, batch.token[0], batch.pos[0] = 1, token, n_past + i
                batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 0, True
                api.llama_decode(llama.ctx, batch)
                token = api.llama_sampler_sample(sampler, llama.ctx, -1)
            return n_tokens / (perf_counter() - start)
        finally:
            api.llama_batch_free(batch)
            api.llama_sampler_free(sampler)


class Ours:
    """What `swift-gguf generate` runs, greedy; kind: ``plain`` or ``auto``."""

    def __init__(self, model: str, n_threads: int, kind: str) -> None:
        from swift_gguf.model import Model, ModelOptions
        from swift_gguf.session import Session
        from swift_gguf.speculation import Speculation, SpeculationOptions

        loaded = Model(Path(model), ModelOptions(n_ctx=N_CTX, n_threads=n_threads))
        speculation = Speculation(
            loaded, SpeculationOptions(mode="auto" if kind == "auto" else "off")
        )
        self._session = Session(loaded, speculation)

    def __call__(self, text: str, n_tokens: int) -> float:
        from swift_gguf.sampling.sampling import SamplingOptions
        from swift_gguf.text.text import encode

        session = self._session
        answer = session.answer(
            encode(session.model, text), SamplingOptions(temperature=0), max_tokens=n_tokens + 1
        )
        for _ in answer:
            pass
        return answer.stats.cycle_n / answer.stats.cycle_s


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        try:
            sys.exit(main())
        except (SwiftError, OSError) as error:
            sys.exit(f"error: {error}")
