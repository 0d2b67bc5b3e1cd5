"""Logits have the same bits at every width, for every type that has a kernel."""

from __future__ import annotations

import platform
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import make_synthetic
from swift_gguf.model.model import Model
from swift_gguf.native.binding import library
from tests.conftest import N_GPU_LAYERS

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K", "F32", "F16", "BF16")
WIDTHS = (2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 33, 63, 64, 72)

pytestmark = pytest.mark.skipif(
    N_GPU_LAYERS != 0 or platform.machine() not in ("x86_64", "AMD64"),
    reason="a property of the kernels for x86 with AVX2",
)


@pytest.fixture(scope="module", params=[512, 510], ids=["", "510 tokens"])
def make(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A model of random weights, all matrices of one type, with rows of whole K-quant blocks.

    Its head has 512 rows, or some that are left where kernels take them by four or eight.
    """
    folder = tmp_path_factory.mktemp("kernels")
    source = folder / "source.gguf"
    shapes = make_synthetic.SHAPES
    shapes["test"] = replace(shapes["tiny"], n_vocab=request.param)
    make_synthetic.write_synthetic(source, name="test", type_name="q8_0")
    del shapes["test"]

    def make_one(kind: str) -> Path:
        path = folder / f"{kind}.gguf"
        api = library().api
        params = api.llama_model_quantize_default_params()
        params.ftype = getattr(api, f"LLAMA_FTYPE_{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}")
        params.allow_requantize = params.pure = True
        assert api.llama_model_quantize(bytes(source), bytes(path), params) == 0
        return path

    return make_one


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_width_has_the_same_bits(
    kind: str, n_threads: int, make: Callable[[str], Path], open_model: Callable[..., Model]
) -> None:
    same_at_every_width(open_model(make(kind), n_threads=n_threads), kind)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("kind", ["Q4_K_M", "F16"])
def test_without_flash_attention_too(
    kind: str, n_threads: int, make: Callable[[str], Path], open_model: Callable[..., Model]
) -> None:
    """Products of queries with keys, and of their weights with values, are F16 then."""
    same_at_every_width(open_model(make(kind), n_threads=n_threads, flash_attn=False), kind)


def same_at_every_width(model: Model, kind: str) -> None:
    rng = random.Random(kind)
    tokens = [rng.randrange(model.n_vocab) for _ in range(20 + max(WIDTHS))]
    text, more = tokens[:20], tokens[20:]

    model.decode(text)
    alone: list[Any] = []
    for token in more:
        model.decode([token])
        alone.append(model.logits(0))
    for width in WIDTHS:
        model.rollback(len(text))
        model.decode(more[:width], n_outputs=width)
        rows = [model.logits(row) for row in range(width)]
        np.testing.assert_array_equal(rows, alone[:width], err_msg=f"width {width}")


def test_without_them_it_would_not(
    make: Callable[[str], Path], open_model: Callable[..., Model]
) -> None:
    """ggml has another kernel for several columns of repacked Q4_K."""
    model = open_model(make("Q4_K_M"))
    model._at_every_width = False
    model.decode(list(range(20)))
    alone = []
    for token in range(16):
        model.decode([token], exact=False)
        alone.append(model.logits(0))
    model.rollback(20)
    model.decode(list(range(16)), n_outputs=16, exact=False)
    assert any((model.logits(row) != alone[row]).any() for row in range(16))
