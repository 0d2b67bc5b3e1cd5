"""The command line as a person meets it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from swift_gguf.gguf import header
from swift_gguf.gguf.identity import fingerprint
from swift_gguf.learning import Known, Profile, Seen, Store
from swift_gguf.subnetwork import SubNetwork

COMMAND = [sys.executable, "-m", "swift_gguf"]


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`cli("generate", path, ..., stdin="")`: the finished process."""

    def run(
        *arguments: object, stdin: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | environment,
        )

    return run


def assert_one_line_failure(done: subprocess.CompletedProcess[str]) -> None:
    """Exit code 1 and one line on standard error; no traceback, no signal."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert done.stderr.startswith("swift-gguf: "), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own for what is learned."""
    folder = tmp_path / "profiles"
    monkeypatch.setenv("SWIFT_GGUF_PROFILES", str(folder))
    return folder


@pytest.fixture
def knowing(profiles: Path) -> Callable[..., Path]:
    """`knowing(path, {1})`: a model whose profile says that drafts do best without these FFNs."""

    def know(path: Path, skip_ffn: set[int]) -> Path:
        metadata = header.read(path).metadata
        n_layer = metadata[f"{metadata['general.architecture']}.block_count"]
        subnetwork = SubNetwork(n_layer=n_layer, skip_ffn=frozenset(skip_ffn))
        seen = {"a window": Seen(agrees=(True,) * 80, confidence=(0.9,) * 80)}
        known = (Known(subnetwork=subnetwork, seen=seen),)
        Store(profiles).add(
            Profile(fingerprint=fingerprint(path), model="a test", n_layer=n_layer, known=known)
        )
        return path

    return know
