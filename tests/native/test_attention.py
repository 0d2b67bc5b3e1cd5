"""Attention: a token's row has the same bits in every batch and at every place in the cache."""

from __future__ import annotations

import platform
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import N_GPU_LAYERS
from tests.native.attentions import Attention
from tests.native.products import Floats

pytestmark = pytest.mark.skipif(
    N_GPU_LAYERS != 0 or platform.machine() not in ("x86_64", "AMD64"),
    reason="a property of the kernels for x86 with AVX2",
)

KINDS = [
    (Type.F16, Type.F16), (Type.F32, Type.F32), (Type.BF16, Type.BF16), (Type.Q8_0, Type.Q8_0),
    (Type.Q4_0, Type.Q4_0), (Type.Q8_0, Type.F16), (Type.F16, Type.Q5_1),
]  # fmt: skip


def reference(x: Attention) -> Floats:
    """Softmax of scores, in 64 bits."""
    n_heads, n_groups = x.queries.shape[1], x.keys.shape[1]
    keys = np.repeat(x.keys.astype(np.float16), n_heads // n_groups, axis=1).astype(np.float64)
    values = np.repeat(x.values.astype(np.float16), n_heads // n_groups, axis=1).astype(np.float64)
    scores = np.einsum("thd,chd->htc", x.queries, keys) * x.queries.shape[2] ** -0.5
    if x.softcap:
        scores = x.softcap * np.tanh(scores / x.softcap)
    slopes = np.ones(n_heads)
    if x.max_bias:
        n_log2 = 1 << int(np.log2(n_heads))
        for head in range(n_heads):
            base = 2.0 ** -((x.max_bias if head < n_log2 else x.max_bias / 2) / n_log2)
            slopes[head] = base ** (head + 1 if head < n_log2 else 2 * (head - n_log2) + 1)
    if x.mask is not None:
        scores = scores + slopes[:, None, None] * x.mask[None]
    if x.sinks is not None:
        sinks = np.broadcast_to(x.sinks[:, None, None], (*scores.shape[:2], 1))
        scores = np.concatenate([scores, sinks], axis=2)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    result = np.einsum("htc,chd->thd", weights[:, :, : len(values)], values)
    return np.asarray(result, np.float32)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize(("n", "n_values"), [(64, 64), (80, 80), (128, 128), (72, 48), (576, 512)])
@pytest.mark.parametrize(("n_heads", "n_groups"), [(6, 2), (4, 4), (5, 1), (52, 1)])
def test_it_is_attention(
    n: int, n_values: int, n_heads: int, n_groups: int, n_threads: int
) -> None:
    """With groups of any size, and more threads than groups."""
    shape = {"n_heads": n_heads, "n_groups": n_groups, "n": n, "n_values": n_values}
    x = Attention.random(n_tokens=19, n_cells=70, **shape)
    np.testing.assert_allclose(x.compute(n_threads=n_threads), reference(x), atol=3e-6)


@pytest.mark.parametrize("what", ["softcap", "bias", "sinks", "no mask", "window"])
def test_what_models_add_to_it(what: str) -> None:
    x = Attention.random(n_tokens=9, n_cells=90, n_heads=6)
    mask = x.mask
    assert mask is not None
    if what == "softcap":
        x = replace(x, softcap=2.0)
    elif what == "bias":
        distance = np.arange(81, 90)[:, None] - np.arange(90)[None]
        x = replace(x, max_bias=8.0, mask=np.where(distance >= 0, -distance, -np.inf))
    elif what == "sinks":
        x = replace(x, sinks=np.linspace(-3, 3, 6, dtype=np.float32))
    elif what == "window":
        mask[:, :50] = -np.inf
    else:
        x = replace(x, mask=None)
    np.testing.assert_allclose(x.compute(n_threads=2), reference(x), atol=3e-6)


def test_a_token_that_reads_nothing_gets_zeros() -> None:
    x = Attention.random(n_tokens=3)
    assert x.mask is not None
    x.mask[1] = -np.inf
    result = x.compute()
    assert not result[1].any()
    np.testing.assert_array_equal(result[0], x.tokens(slice(0, 1)).compute()[0])


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("kinds", KINDS)
def test_every_batch_gives_the_same_bits(kinds: tuple[Type, Type], n_threads: int) -> None:
    x = Attention.random(n_tokens=150, n_cells=333, kinds=kinds)
    together = x.compute(n_threads=n_threads)
    for size in (1, 2, 7, 16, 63, 64, 100):
        parts = [slice(start, start + size) for start in range(0, 150, size)]
        apart = [x.tokens(part).compute(n_threads=n_threads) for part in parts]
        np.testing.assert_array_equal(np.concatenate(apart), together, err_msg=f"{size} tokens")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_place_gives_the_same_bits(data: st.DataObject) -> None:
    """Gaps may hold anything, as after a rejected draft."""
    n_tokens = data.draw(st.integers(1, 20))
    x = Attention.random(n_tokens=n_tokens, n_cells=data.draw(st.integers(20, 150)))
    n = len(x.keys)
    n_cells = n + data.draw(st.integers(0, 100))
    places = data.draw(st.lists(st.integers(0, n_cells - 1), min_size=n, max_size=n, unique=True))
    fill = data.draw(st.sampled_from([0.0, np.nan, np.inf, 1e4]))
    elsewhere = x.spread(np.array(sorted(places)), n_cells, fill)
    n_threads = data.draw(st.integers(1, 3))
    np.testing.assert_array_equal(elsewhere.compute(n_threads=n_threads), x.compute())


def test_a_value_that_is_not_finite_spoils_only_who_reads_it() -> None:
    x = Attention.random(n_tokens=8, n_cells=64)
    clean = x.compute()
    x.values[60] = np.nan
    x.keys[61] = np.inf
    spoiled = x.compute()
    np.testing.assert_array_equal(spoiled[:4], clean[:4])
    assert not np.isfinite(spoiled[4:]).any()


def test_llama_cpps_own_would_not() -> None:
    """The control: its tiles and split sums show in the bits."""
    x = Attention.random(n_tokens=150, n_cells=600)
    together = x.compute(is_ours=False)
    alone = np.concatenate([x.tokens(slice(i, i + 1)).compute(is_ours=False) for i in range(150)])
    assert (together != alone).any()
    np.testing.assert_allclose(x.compute(), together, atol=2e-3)
