#!/usr/bin/env python3
"""Converts a Hugging Face checkpoint to GGUF: the same as `swift-gguf convert`."""

import sys

from swift_gguf.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
