#!/usr/bin/env python3
"""Measures how long requests wait for a search that runs while nobody asks."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benching import positive

from swift_gguf.bench.idle import measure, render
from swift_gguf.bench.output import require_folder, write_json
from swift_gguf.errors import SwiftError
from swift_gguf.hub import models
from swift_gguf.learning.profile import Store
from swift_gguf.model import Model, ModelOptions
from swift_gguf.suite import BUILT_IN
from swift_gguf.text.text import encode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="a path, hf:owner/repo/file, or a registry name"
    )
    parser.add_argument("--requests", type=positive, default=25, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the times between")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    parser.add_argument("-t", "--threads", type=positive, metavar="N")
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=-1, metavar="N")
    args = parser.parse_args()
    load = ModelOptions(n_ctx=1024, n_threads=args.threads, n_gpu_layers=args.n_gpu_layers)
    try:
        require_folder(args.json)
        with (
            Model(models.resolve(args.model), load) as model,
            tempfile.TemporaryDirectory() as profiles,
        ):
            report = measure(
                model,
                [encode(model, text) for text in BUILT_IN],
                requests=args.requests,
                store=Store(Path(profiles)),
                seed=args.seed,
                progress=lambda line: print(line, file=sys.stderr, flush=True),
            )
        if args.json:
            write_json(args.json, report.as_dict())
    except (SwiftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(render(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
