"""Real small models, fetched by name or requantised from one that was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from swift_gguf.hub.models import cache_dir, resolve
from swift_gguf.native.binding import library

# enum llama_ftype
FTYPES = {"Q8_0": 7, "Q4_0": 2}


@pytest.fixture(scope="session")
def real() -> Callable[..., Path]:
    """`real(name, quant=None)`: the path of a registry model, requantised if asked for."""

    def get(name: str, quant: str | None = None) -> Path:
        path = resolve(name)
        if quant is None:
            return path
        made = cache_dir() / "test-models" / f"{path.stem}.{quant}.gguf"
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            api = library().api
            params = api.llama_model_quantize_default_params()
            params.ftype, params.allow_requantize = FTYPES[quant], True
            scratch = made.with_suffix(f".{os.getpid()}")
            assert api.llama_model_quantize(str(path).encode(), str(scratch).encode(), params) == 0
            scratch.replace(made)
        return made

    return get
