"""Python processes that see our modules, and nothing of the folder one happens to be in."""

from __future__ import annotations

import json
import os
import sys

# `-m` and `-c` would put the working directory first, and a json.py there would be run
_START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def command(module: str, *arguments: str) -> list[str]:
    """Runs `module` as `python -m` does, isolated, with this process's search path."""
    return [sys.executable, "-I", "-c", _START, json.dumps(sys.path), module, *arguments]


def environment() -> dict[str, str]:
    """For a process with little memory: what a user preloads (an allocator, a sanitizer) may need
    more addresses than it gets."""
    preloads = ("LD_PRELOAD", "DYLD_INSERT_LIBRARIES")
    return {name: value for name, value in os.environ.items() if name not in preloads}
