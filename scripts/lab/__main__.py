"""Runs an experiment by name: `python scripts/lab EXPERIMENT --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

if not __package__:  # run as a folder, which Python then takes for the place of all imports
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from swift_gguf.errors import SwiftError

EXPERIMENTS = {
    "mechanism": "what passes, skipped sub-layers, graph switches and the engine cost",
    "reference": "the patched library against llama.cpp as it came: speed, and every bit",
    "busy": "answers beside other programs that compute, against stock llama.cpp",
    "servers": "everyday requests to stock llama-server and to `swift-gguf serve`",
    "load": "three llama-servers with 1, 2, 4 and 8 clients: stock, its n-grams, ours",
    "prompts": "prompts by length, against stock llama-bench",
    "front": "what drafts cost against how often they are right",
    "search": "searches for sub-networks at equal time, and their estimates against real drafts",
    "drafting": "ways of drafting with one sub-network, and what the first answers cost",
    "first": "the first answer of a model: without known costs of passes, with them, and plain",
    "replay": "the planner against every fixed setting, on recorded answers",
    "ahead": "the first token after Enter, with the prompt read while it is typed and without",
    "idle": "how long a request waits for a search that runs while nobody asks",
}


def main(arguments: Sequence[str]) -> int:
    """Runs an experiment; returns its exit status."""
    name, *others = [*arguments, "--help"][: len(arguments) or 1]
    if name not in EXPERIMENTS:
        print("usage: python scripts/lab EXPERIMENT ...\n")
        print("\n".join(f"  {each:<10} {what}" for each, what in EXPERIMENTS.items()))
        return 0 if name in ("-h", "--help") else 2
    try:
        status: int = import_module(f"lab.{name}").main(others)
    except (SwiftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
