"""A prompt gives the same logits however it is cut, and whatever was in the context before."""

from __future__ import annotations

import platform
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swift_gguf.model import Model
from swift_gguf.native import buffer
from tests.conftest import N_GPU_LAYERS

pytestmark = pytest.mark.skipif(
    N_GPU_LAYERS != 0 or platform.machine() not in ("x86_64", "AMD64"),
    reason="a property of the kernels for x86 with AVX2",
)

CHUNKS = (1, 7, 63, 64, 73, 200, 512)
MODELS = [
    ("llama", "Q8_0", {}),
    ("llama", "F16", {}),
    ("llama", "Q4_0", {"n_threads": 1}),
    ("gemma3", "Q8_0", {}),  # most layers have a window
    ("qwen3moe", "Q8_0", {}),
]
N = 600


@pytest.fixture(params=MODELS, ids=lambda param: f"{param[0]}-{param[1]}")
def model(
    request: pytest.FixtureRequest, tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> Model:
    family, quant, options = request.param
    return open_model(tiny(family, quant=quant), n_ctx=2048, **options)


def tokens_of(model: Model, n: int = N, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, model.n_vocab) for _ in range(n)]


def read(model: Model, tokens: list[int], chunk: int = 512) -> Any:
    """The logits after them."""
    for start in range(0, len(tokens), chunk):
        model.decode(tokens[start : start + chunk])
    return model.logits(0)


def test_however_it_is_cut(model: Model) -> None:
    prompt = tokens_of(model)
    whole = read(model, prompt)
    for chunk in CHUNKS:
        model.clear()
        np.testing.assert_array_equal(read(model, prompt, chunk), whole, err_msg=f"by {chunk}")


def test_after_another_conversation(model: Model) -> None:
    """Its first part stays; branches leave gaps between the cells."""
    prompt = tokens_of(model)
    whole = read(model, prompt)
    model.clear()
    read(model, prompt[:100])
    read(model, tokens_of(model, 333, seed=1))
    model.rollback(100)
    for at in (100, 102, 104):
        model.decode_tree([7, prompt[at], prompt[at + 1], 9], [-1, -1, 1, 0])
        model.keep([1, 2])
    read(model, prompt[106:300])
    read(model, tokens_of(model, 20, seed=2))
    model.rollback(290)
    np.testing.assert_array_equal(read(model, prompt[290:]), whole)


def test_from_a_saved_state(model: Model) -> None:
    """llama.cpp puts cells that it loads in other places."""
    prompt = tokens_of(model)
    whole = read(model, prompt)
    model.clear()
    read(model, prompt[:450], 100)
    state = buffer(model._api.llama_state_seq_get_size(model.ctx, 0))
    assert model._api.llama_state_seq_get_data(model.ctx, state, len(state), 0) == len(state)
    model.clear()
    assert model._api.llama_state_seq_set_data(model.ctx, state, len(state), 0) == len(state)
    model.assume(prompt[:450])
    np.testing.assert_array_equal(read(model, prompt[450:]), whole)


def test_llama_cpps_own_kernels_would_not(
    tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    """The control."""
    model = open_model(tiny("llama", quant="Q8_0"), n_ctx=2048)
    model._at_every_width = False
    prompt = tokens_of(model)
    rows = []
    for chunk in (7, 512):
        model.clear()
        for start in range(0, N, chunk):
            model.decode(prompt[start : start + chunk], exact=False)
        rows.append(model.logits(0))
    assert (rows[0] != rows[1]).any()
