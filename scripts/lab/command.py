"""Common flags of the experiments, and their common end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab import corpus
from lab.output import write_json
from swift_gguf.model import ModelOptions
from swift_gguf.outputs import require_folder, require_matplotlib


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def model_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Flags for a model, how to run it, and where the report goes.

    name: the experiment's.
    """
    parser = argparse.ArgumentParser(prog=f"python scripts/lab {name}", description=description)
    parser.add_argument(
        "model", metavar="MODEL", help="a path, hf:owner/repo/file, or a registry name"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    parser.add_argument("-t", "--threads", type=positive, metavar="N")
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=-1, metavar="N")
    return parser


def suite_parser(
    name: str, description: str | None, *, prompts: int, tokens: int, seed: int = 0
) -> argparse.ArgumentParser:
    """The flags of `model_parser`, and those for the prompts of a suite."""
    parser = model_parser(name, f"{description}\n\nCtrl-C stops; the results so far are reported.")
    parser.add_argument(
        "--suite", type=Path, required=True, metavar="FILE", help="JSON lines with turns"
    )
    parser.add_argument("--prompts", type=positive, default=prompts, metavar="N")
    parser.add_argument(
        "--max-prompt", type=positive, default=400, metavar="N", help="leave longer ones out"
    )
    parser.add_argument("--tokens", type=positive, default=tokens, metavar="N", help="of an answer")
    parser.add_argument("--seed", type=int, default=seed, metavar="N", help="which prompts")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    return parser


def suite_options(args: argparse.Namespace) -> ModelOptions:
    """How the model is loaded: with a context for the longest prompt and its answer."""
    return ModelOptions(
        n_ctx=corpus.context_size(args.max_prompt, args.tokens),
        n_threads=args.threads,
        n_gpu_layers=args.n_gpu_layers,
    )


def tell(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def finish(
    args: argparse.Namespace,
    report: Any,
    *,
    run: Callable[[], None],
    render: Callable[[Any], str],
    plot: Callable[[Any, Path], None] | None = None,
) -> int:
    """Fills the report by `run` and writes it, also after Ctrl-C.

    Returns the exit status.
    """
    require_folder(args.json)
    picture: Path | None = args.plot if plot else None
    if picture:
        require_folder(picture)
        require_matplotlib()
    status = 0
    try:
        run()
    except KeyboardInterrupt:
        status = 130
    finally:
        if args.json:
            write_json(args.json, report.as_dict())
    if plot and picture:
        plot(report, picture)
    print(render(report))
    return status
