#!/usr/bin/env python3
"""Compares the patched library, no sub-network set, with llama.cpp as it came: speed and logits."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benching import positive

from swift_gguf.bench.reference import compare, render, verdict
from swift_gguf.errors import NativeLibraryError, SwiftError
from swift_gguf.hub import models
from swift_gguf.native.load import find_library

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path("build") / "reference"
TOLERANCE = 0.01


def build_reference() -> Path:
    """llama.cpp without our patch, in build/reference/lib; instant if it is there already."""
    jobs = str(os.cpu_count() or 2)
    configure = ["cmake", "-S", ".", "-B", str(BUILD), "-DSWIFT_GGUF_REFERENCE=ON"]
    python = f"-DPython3_EXECUTABLE={sys.executable}"
    for command in (
        [*configure, python],
        ["cmake", "--build", str(BUILD), "--target", "swift_gguf", "--parallel", jobs],
    ):
        try:
            # standard output is for the report
            subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        except FileNotFoundError:
            raise NativeLibraryError(
                "cmake is not installed; install it (pip install cmake)"
            ) from None
        except subprocess.CalledProcessError:
            raise NativeLibraryError(f"{' '.join(command)} failed, see above") from None
    return ROOT / BUILD / "lib"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="a path, hf:owner/repo/file, or a registry name"
    )
    parser.add_argument(
        "--reference-lib",
        type=Path,
        metavar="DIR",
        help="a folder with an unpatched libllama (default: build it)",
    )
    parser.add_argument(
        "--patched-lib", type=Path, metavar="DIR", help="default: the package's own"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    parser.add_argument("--rounds", type=positive, default=15, metavar="N")
    parser.add_argument("-t", "--threads", type=positive, metavar="N")
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=-1, metavar="N")
    args = parser.parse_args()
    try:
        report = compare(
            models.resolve(args.model),
            args.patched_lib or find_library(),
            args.reference_lib or build_reference(),
            rounds=args.rounds,
            n_threads=args.threads,
            n_gpu_layers=args.n_gpu_layers,
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
    for what, ratio in (("decode", report.decode_ratio), ("prefill", report.prefill_ratio)):
        print(f"{what} within {TOLERANCE:.0%} of unpatched llama.cpp: {verdict(ratio, TOLERANCE)}")
    return 0 if report.logits.identical else 1


if __name__ == "__main__":
    sys.exit(main())
