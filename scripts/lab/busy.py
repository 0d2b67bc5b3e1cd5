"""Compares stock llama.cpp with us, with and without drafts, while other programs compute.

Every contender is a process of its own that has its model loaded.  In every round each of them
answers the same prompt, in turns, with 0, 1, 2, ... busy loops beside it.  A figure is the median
of the ratios to the faster one of stock's thread counts in the same round.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

from lab.command import model_parser, positive
from lab.output import write_json
from lab.reference import build_reference
from lab.worker import Worker
from swift_gguf.bench.spread import table
from swift_gguf.bench.subject import machine
from swift_gguf.hub import models
from swift_gguf.native.load import find_library
from swift_gguf.outputs import require_folder

PROMPTS = (  # to be continued: answers go on for long
    "Once upon a time there was a lighthouse keeper who found a letter in a bottle. One morning",
    "A bicycle stays upright for several reasons. The first reason is that",
    'def merge(a, b):\n    """Merges two sorted lists into one."""\n    result = []\n',
)
BUSY_LOOP = "while True: pass"
SETTLE_S = 0.3


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
    """Runs busy loops beside us."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) for _ in range(n)]
    try:
        sleep(SETTLE_S)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main(arguments: Sequence[str]) -> int:
    parser = model_parser("busy", __doc__)
    parser.add_argument("--tokens", type=positive, default=48, metavar="N", help="of an answer")
    parser.add_argument("--rounds", type=positive, default=6, metavar="N")
    parser.add_argument("--loops", default="0,1,2", metavar="N,...", help="busy loops beside it")
    parser.add_argument("--stock-lib", type=Path, metavar="DIR", help="default: build it")
    parser.add_argument("--our-lib", type=Path, metavar="DIR", help="default: the package's own")
    parser.add_argument("--before-lib", type=Path, metavar="DIR", help="an older build, too")
    args = parser.parse_args(arguments)
    require_folder(args.json)
    cores = machine().cores
    path, n = models.resolve(args.model), args.threads or cores
    stock_lib = args.stock_lib or build_reference()
    our_lib = args.our_lib or find_library()
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
        workers = {}
        for name, kind, n_threads, lib in contenders:
            flags = (kind, str(path), str(n_threads), str(args.n_gpu_layers))
            worker = Worker("lab.busy_worker", *flags, lib_dir=lib, patched=kind != "stock")
            workers[name] = stack.enter_context(worker)
            worker.ask("answer", PROMPTS[0], 8)
        for loops in map(int, args.loops.split(",")):
            with busy(loops):
                rows = [_round(workers, number, args.tokens) for number in range(args.rounds)]
            report["loops"][loops] = rows
            print(render(loops, rows, list(workers)), flush=True)
    if args.json:
        write_json(args.json, report)
    return 0


def _round(workers: Mapping[str, Worker], number: int, n_tokens: int) -> dict[str, float]:
    names = list(workers) if number % 2 else list(workers)[::-1]
    prompt = PROMPTS[number % len(PROMPTS)]
    return {name: workers[name].ask("answer", prompt, n_tokens) for name in names}
