"""A plain build of the same llama.cpp, to compare with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def reference_lib() -> Path:
    """The folder of an unpatched libllama, built from the pinned source: minutes, once."""
    if given := os.environ.get("SWIFT_GGUF_REFERENCE_LIB"):
        return Path(given)
    build = ROOT / "build" / "reference"
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-DSWIFT_GGUF_REFERENCE=ON"]
    configure.append(f"-DPython3_EXECUTABLE={sys.executable}")
    compile_ = ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 2)]
    for command in (configure, compile_):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return build / "lib"
