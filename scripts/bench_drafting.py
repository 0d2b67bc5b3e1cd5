#!/usr/bin/env python3
"""Compares ways of drafting on the sub-network that `swift-gguf tune` found, with plain decoding.

Ctrl-C ends it; what was measured until then is written and shown.
"""

from __future__ import annotations

import argparse
import sys

from benching import finish, loading, positive, suite_parser, tell

from swift_gguf.bench import corpus, plots
from swift_gguf.bench.cold import Cold, measure_cold
from swift_gguf.bench.drafting import Report, known_subnetwork, measure, render
from swift_gguf.hub import models
from swift_gguf.model.model import Model
from swift_gguf.subnetwork import SubNetwork, parse_layers


def main() -> int:
    parser = suite_parser(__doc__, prompts=10, tokens=96)
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
    args = parser.parse_args()
    if args.cold and args.plot:
        parser.error("--cold has nothing to plot")

    report = Report()
    return finish(
        args, report, run=lambda: run(args, report), plot=plots.plot_drafting, render=render
    )


def run(args: argparse.Namespace, report: Report) -> None:
    with Model(models.resolve(args.model), loading(args)) as model:
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
                progress=tell,
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
                progress=tell,
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
