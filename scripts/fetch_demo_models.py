#!/usr/bin/env python3
"""Fetch demo models into the user's cache: fetch_demo_models.py [NAME ...]

Without a name: the small default.  Prints one path a line; `swift-gguf models` lists the names.
"""

from __future__ import annotations

import sys

from swift_gguf.errors import SwiftError
from swift_gguf.hub import models
from swift_gguf.hub.progress import download_progress


def main(names: list[str]) -> int:
    if any(name.startswith("-") for name in names):
        print(__doc__.strip(), file=sys.stderr)
        return 0 if {"-h", "--help"} & set(names) else 2
    try:
        for name in names or [models.registry()[0].name]:
            with download_progress(name) as progress:
                print(models.resolve(name, progress=progress), flush=True)
    except SwiftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
