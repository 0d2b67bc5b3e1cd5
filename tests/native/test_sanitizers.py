"""Our native code under AddressSanitizer and UndefinedBehaviorSanitizer, on generated models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.instrumented import find_build, instrument, runtime

ROOT = Path(__file__).parents[2]
SUITES = (
    "tests/native/test_c_api.py",
    "tests/prepare/test_sidecar.py",
    "tests/model/test_masks.py",
    "tests/native/test_bindings.py",
    "tests/native/test_kernels.py",
    "tests/native/test_chat_answers.py",
)
TOO_LITTLE_ROOM = """
import ctypes, sys
from swift_gguf.model import Model, ModelOptions
with Model(sys.argv[1], ModelOptions(n_ctx=256, n_gpu_layers=0, n_threads=1)) as model:
    model.decode([5])
    tokens, probabilities = (ctypes.c_int32 * 40)(), (ctypes.c_float * 40)()
    model._library._swift.swift_gguf_top(model.ctx, 0, int(sys.argv[2]), tokens, probabilities)
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which Python runs our code under the sanitizers."""
    build = find_build(ROOT)
    if build is None or not shutil.which("g++") or not shutil.which("ninja"):
        pytest.skip("needs a build by ninja and g++")
    folder = tmp_path_factory.mktemp("sanitized")
    lib = instrument(build, ROOT / "native", folder)
    return {
        **os.environ,
        "SWIFT_GGUF_LIB_DIR": str(lib),
        "LD_PRELOAD": runtime("g++"),
        "PYTHONMALLOC": "malloc",  # guarded, too
        # Python keeps what it allocates until it ends
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={folder / 'report'}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:log_path={folder / 'report'}",
    }


def run(sanitized: dict[str, str], *arguments: str) -> tuple[str, str]:
    """What the sanitizers report, and what a process that did not end well has written."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=sanitized, capture_output=True, text=True
    )
    folder = Path(sanitized["SWIFT_GGUF_LIB_DIR"]).parent
    reports = sorted(folder.glob("report.*"))
    report = "".join(path.read_text(errors="replace") for path in reports)
    for path in reports:
        path.unlink()
    return report, done.stdout + done.stderr if done.returncode else ""


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_nothing_is_reported(suite: str, sanitized: dict[str, str]) -> None:
    report, failure = run(
        sanitized, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow",
        suite,
    )  # fmt: skip
    assert not report, report[:4000]
    assert not failure, failure[-4000:]


@pytest.mark.slow
def test_a_write_behind_an_array_is_reported(
    sanitized: dict[str, str], tiny: Callable[..., Path]
) -> None:
    path = str(tiny("llama"))
    assert run(sanitized, "-c", TOO_LITTLE_ROOM, path, "40") == ("", "")
    report, _ = run(sanitized, "-c", TOO_LITTLE_ROOM, path, "60")
    assert "AddressSanitizer: heap-buffer-overflow" in report
    assert "swift-draft.cpp" in report
