"""The patch on the real pinned source."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native.conftest import ROOT

sys.path.insert(0, str(ROOT / "native"))
import source

# What the patch may touch; native/README.md explains each.
LISTED = {
    "0001-skip-sublayers.patch": {
        "src/llama-context.h",
        "src/llama-cparams.h",
        "src/llama-graph.cpp",
        "src/llama-graph.h",
        "src/llama-model.cpp",
    },
    "0002-products.patch": {
        "ggml/src/ggml-cpu/ggml-cpu.c",
        "ggml/src/ggml-cpu/repack.cpp",
    },
    "0003-bounded-parsing.patch": {"common/peg-parser.cpp", "common/peg-parser.h"},
    "0004-waiting-threads.patch": {"ggml/src/ggml-cpu/ggml-cpu.c"},
    "0005-attention.patch": {
        "ggml/src/ggml-cpu/ggml-cpu.c",
        "ggml/src/ggml-cpu/ggml-cpu.cpp",
    },
    "0006-server.patch": {
        "common/arg.cpp",
        "common/common.h",
        "common/speculative.cpp",
        "tools/server/server-context.cpp",
        "tools/server/server-schema.cpp",
    },
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pinned source as it came."""
    pin = source.read_pin()
    dest = tmp_path_factory.mktemp("llama.cpp")
    source.unpack(source.fetch_sdist(pin), dest, pin.version)
    return dest


def contents(tree: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tree)): p.read_bytes() for p in tree.rglob("*") if p.is_file()}


def test_applies_once_and_touches_only_listed_files(tree: Path) -> None:
    before = contents(tree)
    source.apply_patches(tree, pin=source.read_pin())
    once = contents(tree)
    assert {name for name in once if once[name] != before.get(name)} == set().union(
        *LISTED.values()
    )
    assert once.keys() == before.keys()
    source.apply_patches(tree, pin=source.read_pin())
    assert contents(tree) == once
    for patch in source.PATCHES:
        assert source.run_patch(tree, patch, "--reverse")
    assert contents(tree) == before


def test_a_tree_it_does_not_fit_is_refused_and_left_alone(tree: Path) -> None:
    target = tree / "src" / "llama-cparams.h"
    good = target.read_bytes()
    target.write_bytes(good.replace(b"ctx_other", b"ctx_else"))
    before = contents(tree)
    try:
        with pytest.raises(source.SourceError, match=source.read_pin().commit[:9]):
            source.apply_patches(tree, pin=source.read_pin())
        assert contents(tree) == before
    finally:
        target.write_bytes(good)


def test_a_users_own_checkout(tree: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "native" / "source.py"), "--tree"]
    done = subprocess.run([*script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("swift-gguf: ")
    assert len(done.stderr.splitlines()) == 1
    for _ in range(2):
        assert subprocess.run([*script, str(tree)]).returncode == 0
    assert b"swift_subnetwork" in (tree / "src" / "llama-cparams.h").read_bytes()


def test_every_hunk_is_explained() -> None:
    readme = (ROOT / "native" / "README.md").read_text()
    for patch in source.PATCHES:
        text = patch.read_text()
        assert set(re.findall(r"^\+\+\+ b/(\S+)", text, re.M)) == LISTED[patch.name]
        for name in LISTED[patch.name]:
            assert name in readme
        for identifier in set(re.findall(r"^\+.*?\b(swift_\w+)\b", text, re.M)):
            assert identifier in readme, f"{identifier} is added by the patch but not explained"
        # call sites only: what is added is short, the code lives in native/src
        assert len(re.findall(r"^\+(?!\+\+)", text, re.M)) < 60
