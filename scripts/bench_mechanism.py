#!/usr/bin/env python3
"""What skipping sub-layers, switching graphs and driving it all costs on a model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benching import positive

from swift_gguf.bench.mechanism import context_size, measure
from swift_gguf.bench.report import render
from swift_gguf.errors import SwiftError
from swift_gguf.hub import models
from swift_gguf.model import Model, ModelOptions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="a path, hf:owner/repo/file, or a registry name"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    parser.add_argument("--rounds", type=positive, default=7, metavar="N")
    parser.add_argument(
        "--repeats", type=positive, default=2, metavar="N", help="passes of a kind a round"
    )
    parser.add_argument(
        "--context", type=positive, default=128, metavar="N", help="tokens decoded before"
    )
    parser.add_argument("-t", "--threads", type=positive, metavar="N")
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=-1, metavar="N")
    args = parser.parse_args()
    options = ModelOptions(
        n_ctx=context_size(args.context), n_threads=args.threads, n_gpu_layers=args.n_gpu_layers
    )
    try:
        with Model(models.resolve(args.model), options) as model:
            report = measure(
                model,
                rounds=args.rounds,
                context=args.context,
                repeats=args.repeats,
                progress=lambda line: print(line, file=sys.stderr, flush=True),
            )
        if args.json:
            args.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    except (SwiftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(render(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
