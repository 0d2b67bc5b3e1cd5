"""The threads of a pass: where they come from, and that they let others compute."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import pytest

from swift_gguf.model.model import Model
from tests.native.conftest import ROOT

Tiny = Callable[..., Path]
Open = Callable[..., Model]

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system pins no threads to a core"
)

PASSES = """
import os, sys
from time import perf_counter
from swift_gguf.model import Model, ModelOptions
n_threads = int(sys.argv[2])
with Model(sys.argv[1], ModelOptions(n_ctx=256, n_gpu_layers=0, n_threads=n_threads)) as model:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # threads are made by the first pass
    model.decode([1] * 8)
    start = perf_counter()
    for token in range(48):
        model.decode([token])
    print(perf_counter() - start)
"""

FORKED = """
import os, sys
from swift_gguf.model import Model, ModelOptions
with Model(sys.argv[1], ModelOptions(n_ctx=256, n_gpu_layers=0, n_threads=2)) as model:
    model.decode([1, 2, 3])
    child = os.fork()
    if child == 0:
        model.decode([4, 5])
        os._exit(0 if len(model.tokens) == 5 else 1)
    _, status = os.waitpid(child, 0)
    model.decode([4, 5])
    print(os.waitstatus_to_exitcode(status))
"""


def run(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_affinity
def test_threads_that_share_a_core_let_each_other_compute(tiny: Tiny) -> None:
    """To spin until the time slice is over takes some seconds."""
    path = tiny("llama", n_layer=8)
    alone, together = (float(run(PASSES, path, n_threads)) for n_threads in (1, 2))
    assert together < 10 * alone + 0.5


@needs_affinity
def test_a_forked_process_has_threads_of_its_own(tiny: Tiny) -> None:
    assert run(FORKED, tiny("llama")).split() == ["0"]


def test_two_models_on_two_threads(tiny: Tiny, open_model: Open) -> None:
    """Each thread has its own pool; what they compute is what one alone computes."""
    path = tiny("llama")
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]

    def answer(model: Model, found: list[bytes]) -> None:
        for _ in range(20):
            model.clear()
            model.decode(tokens)
            found.append(model.logits(0).tobytes())

    alone: list[bytes] = []
    answer(open_model(path, n_threads=2), alone)
    models = [open_model(path, n_threads=2) for _ in range(2)]
    results: tuple[list[bytes], list[bytes]] = ([], [])
    threads = [
        threading.Thread(target=answer, args=pair) for pair in zip(models, results, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(alone) == {*results[0], *results[1]}


def test_threads_end_with_the_one_that_asked(tiny: Tiny, open_model: Open) -> None:
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("this system does not list a process's threads")
    model, seen = open_model(tiny("llama"), n_threads=3), set[Path]()

    def decode() -> None:
        before = set(tasks.iterdir())
        model.decode([1, 2, 3])
        seen.update(set(tasks.iterdir()) - before)

    thread = threading.Thread(target=decode)
    thread.start()
    thread.join()
    assert len(seen) == 2  # the third is the one that asked
    deadline = perf_counter() + 5
    while seen & set(tasks.iterdir()) and perf_counter() < deadline:
        pass
    assert not seen & set(tasks.iterdir())
