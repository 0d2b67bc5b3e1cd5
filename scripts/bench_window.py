#!/usr/bin/env python3
"""What drafts over a long context gain and lose by looking back on its latest tokens only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benching import positive, tell

from swift_gguf import models
from swift_gguf.bench.output import require_folder, write_json
from swift_gguf.bench.window import Report, measure, render
from swift_gguf.errors import SwiftError
from swift_gguf.model import Model, ModelOptions
from swift_gguf.text import encode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="a path, hf:owner/repo/file, or a registry name"
    )
    parser.add_argument("text", type=Path, metavar="TEXT", help="a long text in UTF-8")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[1000, 2000, 3500])
    parser.add_argument("--positions", type=positive, default=100, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    parser.add_argument("-t", "--threads", type=positive, metavar="N")
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=-1, metavar="N")
    args = parser.parse_args()
    load = ModelOptions(
        n_ctx=max(args.lengths) + args.positions + 256,
        n_threads=args.threads,
        n_gpu_layers=args.n_gpu_layers,
    )
    report = Report()
    try:
        require_folder(args.json)
        text = args.text.read_text(encoding="utf-8")
        with Model(models.resolve(args.model), load) as model:
            measure(
                model,
                encode(model, text),
                report,
                lengths=args.lengths,
                positions=args.positions,
                progress=tell,
            )
        if args.json:
            write_json(args.json, report.as_dict())
    except (SwiftError, OSError, UnicodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(render(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
