#!/usr/bin/env python3
"""Compares ways of drafting on the sub-network that `swift-gguf tune` found, with plain decoding.

Ctrl-C ends it; what was measured until then is written and shown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from swift_gguf import models
from swift_gguf.bench import corpus, plots
from swift_gguf.bench.cold import Cold, measure_cold
from swift_gguf.bench.drafting import Report, known_subnetwork, measure, render
from swift_gguf.bench.output import require_folder, write_json
from swift_gguf.errors import SwiftError
from swift_gguf.model import Model, ModelOptions
from swift_gguf.subnetwork import SubNetwork, parse_layers


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
    parser.add_argument("--prompts", type=positive, default=10, metavar="N")
    parser.add_argument(
        "--max-prompt", type=positive, default=400, metavar="N", help="leave longer ones out"
    )
    parser.add_argument("--tokens", type=positive, default=96, metavar="N", help="of an answer")
    parser.add_argument("--rounds", type=positive, default=1, metavar="N")
    parser.add_argument("--draft-max", type=positive, default=8, metavar="N")
    parser.add_argument(
        "--skip-attn", type=parse_layers, metavar="LAYERS", help="instead of the profile's"
    )
    parser.add_argument("--skip-ffn", type=parse_layers, metavar="LAYERS", help="likewise")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="instead: what the search costs where nothing is known yet",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which prompts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("-t", "--threads", type=positive, metavar="N")
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=-1, metavar="N")
    args = parser.parse_args()
    if args.cold and args.plot:
        parser.error("--cold has nothing to plot")

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
            plots.plot_drafting(report, args.plot)
    except (SwiftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(render(report))
    return status


def run(args: argparse.Namespace, report: Report) -> None:
    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    load = ModelOptions(
        n_ctx=corpus.context_size(args.max_prompt, args.tokens),
        n_threads=args.threads,
        n_gpu_layers=args.n_gpu_layers,
    )
    with Model(models.resolve(args.model), load) as model:
        prompts = corpus.prompts(
            model, args.suite, args.prompts, longest=args.max_prompt, seed=args.seed
        )
        report.begin(model, prompts)
        if args.cold:
            report.cold = Cold()
            measure_cold(
                model,
                prompts,
                report.cold,
                tokens=args.tokens,
                draft_max=args.draft_max,
                progress=progress,
            )
        else:
            measure(
                model,
                prompts,
                report,
                subnetwork=subnetwork(model, args),
                tokens=args.tokens,
                rounds=args.rounds,
                draft_max=args.draft_max,
                progress=progress,
            )


def subnetwork(model: Model, args: argparse.Namespace) -> SubNetwork:
    if args.skip_attn is None and args.skip_ffn is None:
        return known_subnetwork(model)
    return SubNetwork(
        n_layer=model.n_layer,
        skip_attn=args.skip_attn or frozenset(),
        skip_ffn=args.skip_ffn or frozenset(),
    )


if __name__ == "__main__":
    sys.exit(main())
