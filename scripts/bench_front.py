#!/usr/bin/env python3
"""What drafts cost against how often they are right: FFNs left out, or narrowed by the sidecar.

Ctrl-C ends it; what was measured until then is written and shown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from swift_gguf import models
from swift_gguf.bench import corpus, plots
from swift_gguf.bench.front import Report, measure, render
from swift_gguf.bench.output import require_folder, write_json
from swift_gguf.errors import SwiftError
from swift_gguf.model import Model, ModelOptions


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="a path, hf:owner/repo/file, or a registry name"
    )
    parser.add_argument(
        "--suite", type=Path, required=True, metavar="FILE", help="JSON lines with turns"
    )
    parser.add_argument("--category", action="append", metavar="NAME", help="only these")
    parser.add_argument("--prompts", type=positive, default=14, metavar="N")
    parser.add_argument(
        "--max-prompt", type=positive, default=400, metavar="N", help="leave longer ones out"
    )
    parser.add_argument("--tokens", type=positive, default=64, metavar="N", help="of an answer")
    parser.add_argument("--rounds", type=positive, default=15, metavar="N", help="of timed passes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-t", "--threads", type=positive, metavar="N")
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=-1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a figure, PNG or SVG")
    args = parser.parse_args()

    report, status = Report(), 0
    try:
        require_folder(args.json)
        require_folder(args.plot)
        if args.plot:
            plots.require_matplotlib()
        try:
            run(args, report)
        except KeyboardInterrupt:
            status = 130
        finally:
            if args.json:
                write_json(args.json, report.as_dict())
        if args.plot:
            plots.plot_front(report, args.plot)
    except (SwiftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(render(report))
    return status


def run(args: argparse.Namespace, report: Report) -> None:
    load = ModelOptions(
        n_ctx=corpus.context_size(args.max_prompt, args.tokens),
        n_threads=args.threads,
        n_gpu_layers=args.n_gpu_layers,
    )
    with Model(models.resolve(args.model), load) as model:
        prompts = corpus.prompts(
            model,
            args.suite,
            args.prompts,
            longest=args.max_prompt,
            seed=args.seed,
            categories=args.category,
        )
        measure(
            model,
            prompts,
            report,
            tokens=args.tokens,
            rounds=args.rounds,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )


if __name__ == "__main__":
    sys.exit(main())
