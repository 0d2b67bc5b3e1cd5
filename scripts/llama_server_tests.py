#!/usr/bin/env python3
"""Runs llama.cpp's own tests of its server against two binaries and compares what passes.

    scripts/llama_server_tests.py --stock STOCK --model MODEL.gguf [--tests DIR] [-- -k completion]

Ours runs with --spec-type swift.  The tests download models; here --hf-repo and its kind are
replaced by MODEL, which every test then gets, so those that ask for another kind of model (a
reranker, images) or for certain words fail with both.  Exit code 1: a test passes with stock and
not with ours.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WRAPPER = """#!{python}
import os, sys
VALUE = {{"--hf-repo", "--hf-file", "--model-url", "--model"}}
kept, rest = [], iter(sys.argv[1:])
for argument in rest:
    if argument in VALUE:
        next(rest)
    elif argument != "--offline":
        kept.append(argument)
more = {more!r} if "--spec-type" not in kept else []
os.execv({binary!r}, [{binary!r}, "--model", {model!r}, *more, *kept])
"""


def wrapper(path: Path, *, binary: Path, model: Path, more: list[str]) -> Path:
    """A program that starts `binary` with `model`, whatever model it is told to download."""
    text = WRAPPER.format(python=sys.executable, binary=str(binary), model=str(model), more=more)
    path.write_text(text)
    path.chmod(0o755)
    return path


def outcomes(report: Path) -> dict[str, str]:
    """By test: passed, failed or skipped."""
    found = {}
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        children = {child.tag for child in case}
        bad = children & {"failure", "error"}
        found[name] = "failed" if bad else "skipped" if "skipped" in children else "passed"
    return found


def run(tests: Path, binary: Path, report: Path, arguments: list[str]) -> dict[str, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    subprocess.run(
        [*command, f"--junit-xml={report}", "-m", "not slow", *arguments],
        cwd=tests,
        env=os.environ | {"LLAMA_SERVER_BIN_PATH": str(binary)},
    )
    return outcomes(report)


def difference(stock: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Tests that pass with stock and not with ours."""
    return [
        name
        for name, outcome in stock.items()
        if outcome == "passed" and ours.get(name) != "passed"
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stock", type=Path, required=True, help="a llama-server, unpatched")
    parser.add_argument("--ours", type=Path, help="default: swift-gguf config --llama-server")
    parser.add_argument("--model", type=Path, required=True, help="a small GGUF")
    parser.add_argument(
        "--tests",
        type=Path,
        help="tools/server/tests of the pinned source; default: of the latest build",
    )
    parser.add_argument("arguments", nargs="*", help="for pytest")
    options = parser.parse_args()
    built = sorted(ROOT.glob("build/*/llama.cpp/tools/server/tests"), key=os.path.getmtime)
    tests = options.tests or (built[-1] if built else None)
    if tests is None:
        parser.error("there is no build with the tests; run make llama-server")
    ours = options.ours
    if ours is None:
        from swift_gguf.native.load import find_llama_server

        ours = find_llama_server()
    kinds = {"stock": (options.stock, []), "ours": (ours, ["--spec-type", "swift"])}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        # where the tests lie in the source: they look for templates beside it
        copied = Path(folder) / "tools" / "server" / "tests"
        shutil.copytree(tests, copied)
        for name, (binary, more) in kinds.items():
            program = wrapper(
                Path(folder) / f"{name}-server",
                binary=binary.resolve(),
                model=options.model.resolve(),
                more=more,
            )
            report = Path(folder) / f"{name}.xml"
            found[name] = run(copied, program, report, options.arguments)
    for name, each in found.items():
        counts = {kind: list(each.values()).count(kind) for kind in ("passed", "failed", "skipped")}
        print(f"{name}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    worse = difference(found["stock"], found["ours"])
    for name in worse:
        print(f"passes with stock only: {name}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
