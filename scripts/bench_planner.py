#!/usr/bin/env python3
"""Holds the planner against every fixed setting of lookups, free of the machine's noise.

Answers are recorded once, with what passes cost here; what a setting would take is then computed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from swift_gguf.bench.output import markdown, require_folder, write_json
from swift_gguf.bench.replay import Recording, compare, record
from swift_gguf.bench.suites import NAMES, load
from swift_gguf.errors import SwiftError
from swift_gguf.hub import models
from swift_gguf.model import Model, ModelOptions
from swift_gguf.planning.cost import Costs
from swift_gguf.planning.measuring import measure
from swift_gguf.text.text import chat_template, encode, render_chat

WARM_UP = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a path, or a registry name")
    parser.add_argument(
        "--suite", action="append", metavar="FILE", help="as `swift-gguf bench`; may be repeated"
    )
    parser.add_argument("--limit", type=int, default=45, metavar="N", help="rows")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="of an answer")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the order they come in")
    parser.add_argument(
        "--recordings", type=Path, metavar="FILE", help="kept here, and taken from here if it is"
    )
    parser.add_argument("-t", "--threads", type=int, metavar="N")
    args = parser.parse_args()
    try:
        recordings, costs = recorded(args)
    except (SwiftError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    random.Random(args.seed).shuffle(recordings)
    print("passes of w tokens: " + ", ".join(f"{w}: {ms:.1f} ms" for w, ms in costs.pass_ms))
    for cold in (False, True):
        print(f"\n{'each answer the first one' if cold else 'one answer after the other'}\n")
        lines = compare(recordings, costs, cold=cold)
        rows = (
            [x.category, f"{x.auto:.2f}", f"{x.best:.2f} {x.best_name}", f"{x.auto / x.best:.2f}"]
            for x in lines
        )
        print(markdown(["category", "auto", "best fixed", "auto / best"], rows))
    return 0


def recorded(args: argparse.Namespace) -> tuple[list[Recording], Costs]:
    path: Path | None = args.recordings
    if path and path.exists():
        values = json.loads(path.read_text(encoding="utf-8"))
        costs = Costs.from_dict(values["costs"])
        return [Recording.from_dict(each) for each in values["recordings"]], costs
    require_folder(path)
    rows = load(args.suite or NAMES, categories=(), limit=args.limit)
    options = ModelOptions(n_threads=args.threads, sidecar=None)
    recordings = []
    with Model(models.resolve(args.model), options) as model:
        model.decode([7919 * i % model.n_vocab for i in range(WARM_UP)])
        costs = measure(model)
        for n, row in enumerate(rows, 1):
            text = row.turns[0]
            if chat_template(model) is not None:
                text = render_chat(model, [{"role": "user", "content": text}])
            prompt = encode(model, text)
            if len(prompt) + args.tokens + 1 <= model.n_ctx:
                model.clear()
                recordings.append(record(model, row.category, prompt, max_tokens=args.tokens))
            print(f"{n} of {len(rows)} recorded", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if path:
        values = {
            "costs": costs.as_dict(),
            "recordings": [recording.as_dict() for recording in recordings],
        }
        write_json(path, values)
    return recordings, costs


if __name__ == "__main__":
    sys.exit(main())
