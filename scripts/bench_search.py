#!/usr/bin/env python3
"""Compares searches for sub-networks at equal time, and estimates of them with real drafts.

Ctrl-C ends it; what was measured until then is written and shown.
"""

from __future__ import annotations

import argparse
import sys

from benching import finish, loading, suite_parser, tell

from swift_gguf.bench import corpus, plots
from swift_gguf.bench.search_quality import measure
from swift_gguf.bench.search_report import Options, Report, render
from swift_gguf.hub import models
from swift_gguf.model.model import Model


def seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e6:
        raise ValueError
    return number


def ratios(text: str) -> tuple[float, ...]:
    numbers = tuple(float(part) for part in text.split(","))
    if not all(0 < number < 1 for number in numbers):
        raise ValueError
    return numbers


def main() -> int:
    parser = suite_parser(__doc__, prompts=8, tokens=128)
    parser.add_argument(
        "--seconds", type=seconds, default=120.0, metavar="S", help="of search, each method"
    )
    parser.add_argument(
        "--ratios", type=ratios, default=(0.15, 0.3, 0.45), metavar="R,..", help="the paper's r"
    )
    parser.add_argument(
        "--estimates",
        type=int,
        default=8,
        metavar="N",
        help="sub-networks to draft with, to compare estimators; 0: none",
    )
    args = parser.parse_args()

    options = Options(
        tokens=args.tokens,
        seconds=args.seconds,
        ratios=args.ratios,
        estimates=args.estimates,
        seed=args.seed,
    )
    report = Report(options=options)
    return finish(
        args, report, run=lambda: run(args, report), plot=plots.plot_search, render=render
    )


def run(args: argparse.Namespace, report: Report) -> None:
    with Model(models.resolve(args.model), loading(args)) as model:
        prompts = corpus.prompts(
            model, args.suite, args.prompts, longest=args.max_prompt, seed=args.seed
        )
        measure(model, prompts, report, progress=tell)


if __name__ == "__main__":
    sys.exit(main())
