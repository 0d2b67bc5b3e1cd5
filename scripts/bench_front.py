#!/usr/bin/env python3
"""What drafts cost against how often they are right: FFNs left out, or narrowed by the sidecar.

Ctrl-C ends it; what was measured until then is written and shown.
"""

from __future__ import annotations

import argparse
import sys

from benching import finish, loading, positive, suite_parser, tell

from swift_gguf.bench import corpus, plots
from swift_gguf.bench.front import Report, measure, render
from swift_gguf.hub import models
from swift_gguf.model.model import Model


def main() -> int:
    parser = suite_parser(__doc__, prompts=14, tokens=64, seed=1)
    parser.add_argument("--category", action="append", metavar="NAME", help="only these")
    parser.add_argument("--rounds", type=positive, default=15, metavar="N", help="of timed passes")
    args = parser.parse_args()
    report = Report()
    return finish(args, report, run=lambda: run(args, report), plot=plots.plot_front, render=render)


def run(args: argparse.Namespace, report: Report) -> None:
    with Model(models.resolve(args.model), loading(args)) as model:
        prompts = corpus.prompts(
            model,
            args.suite,
            args.prompts,
            longest=args.max_prompt,
            seed=args.seed,
            categories=args.category,
        )
        measure(model, prompts, report, tokens=args.tokens, rounds=args.rounds, progress=tell)


if __name__ == "__main__":
    sys.exit(main())
