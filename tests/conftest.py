"""Fixtures that several folders share: models, from generated ones to the real small ones."""

from __future__ import annotations

import importlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.model import Model, ModelOptions
from tests.fixtures.tiny_gguf import write_tiny

# A shell without job control starts background jobs with Ctrl-C ignored, and children inherit that:
# tests that interrupt would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What tests learn of their models is nobody's profile.
os.environ["SWIFT_GGUF_PROFILES"] = tempfile.mkdtemp(prefix="swift-gguf-profiles-")
# Nor are their conversations anybody's last.
os.environ["SWIFT_GGUF_DATA"] = tempfile.mkdtemp(prefix="swift-gguf-data-")

if os.environ.get("SWIFT_GGUF_TEST_ALL"):  # in CI a package that is missing is a failure

    def _import(
        modname: str,
        minversion: str | None = None,
        reason: str | None = None,
        *,
        exc_type: type[ImportError] | None = None,
    ) -> Any:
        return importlib.import_module(modname)

    pytest.importorskip = _import

N_GPU_LAYERS = int(os.environ.get("SWIFT_GGUF_TEST_NGL", "0"))
"""Layers that tests put on the GPU; 0: tests run on the CPU wherever they are, -1: everything."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(family, ...)`: a generated model's path, made once for the same arguments."""
    folder = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def make(family: str, **options: object) -> Path:
        key = f"{family}-{sorted(options.items())}"
        if key not in made:
            made[key] = write_tiny(folder / f"{len(made)}-{family}.gguf", family, **options)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_path(tiny: Callable[..., Path]) -> str:
    """Llama, 8-bit weights: the same bits at every width."""
    return str(tiny("llama", quant="Q8_0"))


@pytest.fixture
def open_model() -> Iterator[Callable[..., Model]]:
    """`open_model(path, n_ctx=...)`: a loaded model, closed after the test."""
    opened: list[Model] = []

    def open_(path: Path, **options: object) -> Model:
        options = {"n_gpu_layers": N_GPU_LAYERS, "n_ctx": 256} | options
        opened.append(Model(path, ModelOptions(**options)))  # type: ignore[arg-type]
        return opened[-1]

    yield open_
    for model in opened:
        model.close()
