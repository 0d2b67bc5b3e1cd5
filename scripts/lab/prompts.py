"""Compares prompts by length: stock llama.cpp's `llama-bench` and ours.

Each is a process of its own, and they take turns.  A round reads one prompt of every length with
each.  llama-bench warms up before it measures, and so do we.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.command import model_parser, positive, tell
from lab.output import markdown, write_json
from lab.worker import Worker
from swift_gguf.bench.spread import Spread
from swift_gguf.errors import SwiftError
from swift_gguf.hub import models
from swift_gguf.native.load import find_library
from swift_gguf.native.threads import default_threads
from swift_gguf.outputs import require_folder

LENGTHS = "128,512,2048,4096"


def lengths(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def stock_speed(program: Path, model: Path, n: int, *, threads: int, n_gpu_layers: int) -> float:
    """Prompt tokens a second, by llama-bench.

    Raises:
        SwiftError: it cannot be run, or fails.
    """
    flags = ["-p", n, "-n", 0, "-t", threads, "-ngl", max(0, n_gpu_layers), "-fa", 1]
    command = [str(program), "-m", str(model), *map(str, flags), "-r", "1", "-o", "json"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(json.loads(done.stdout)[0]["avg_ts"])
    except OSError as error:
        raise SwiftError(f"{program} cannot be run: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        raise SwiftError(f"llama-bench failed: {lines[-1] if lines else error}") from error


def row(name: str, n: int, stock: Sequence[float], ours: Sequence[float]) -> list[str]:
    """The medians and, of the ratios of each round, the median with the quartiles."""
    ratios = Spread.of(a / b for a, b in zip(ours, stock, strict=True))
    return [
        name,
        str(n),
        f"{Spread.of(stock).median:.0f}",
        f"{Spread.of(ours).median:.0f}",
        ratios.text(),
    ]


def measure(args: Any, path: Path) -> dict[int, tuple[list[float], list[float]]]:
    """For each length: tokens a second of stock's prompts and of ours, a value a round."""
    threads = args.threads or default_threads()
    n_ctx = max(args.lengths) + 256
    arguments = [str(path), str(threads), str(args.n_gpu_layers), str(n_ctx)]
    found: dict[int, tuple[list[float], list[float]]] = {n: ([], []) for n in args.lengths}
    with Worker("lab.prompts_worker", *arguments, lib_dir=find_library(), patched=True) as ours:
        ours.ask("read", min(args.lengths))  # warm up
        for number in range(1, args.rounds + 1):
            for n, (theirs, mine) in found.items():
                tell(f"{path.name}: round {number} of {args.rounds}, {n} tokens")
                options = {"threads": threads, "n_gpu_layers": args.n_gpu_layers}
                theirs.append(stock_speed(args.stock, path, n, **options))
                mine.append(n / ours.ask("read", n))
    return found


def main(arguments: Sequence[str]) -> int:
    parser = model_parser("prompts", __doc__)
    parser.add_argument(
        "--stock",
        type=Path,
        required=True,
        metavar="FILE",
        help="a llama-bench, unpatched, of the commit in native/llama_cpp.pin",
    )
    parser.add_argument(
        "--lengths",
        type=lengths,
        default=lengths(LENGTHS),
        metavar="N,N",
        help=f"default: {LENGTHS}",
    )
    parser.add_argument("--rounds", type=positive, default=3, metavar="N")  # fmt: skip
    args = parser.parse_args(arguments)
    require_folder(args.json)
    path = models.resolve(args.model)
    found = measure(args, path)
    if args.json:
        write_json(args.json, {"model": path.name, "lengths": found})
    headers = ["model", "tokens", "stock, tok/s", "ours, tok/s", "ratio: median (quartiles)"]
    print(markdown(headers, [row(path.stem, n, *found[n]) for n in found]))
    return 0
