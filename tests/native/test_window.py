"""Drafts that look back on the latest part of a long context only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swift_gguf.drafting.passes import Passes
from swift_gguf.drafting.tree import Tree
from swift_gguf.model import Model
from swift_gguf.subnetwork import DRAFT_WINDOW, SubNetwork
from tests.fixtures.tiny_gguf import FAMILIES

N_CTX = 2048
TEXT = [7 * i % 90 + 5 for i in range(1100)]
SEEN = DRAFT_WINDOW  # of the latest tokens, at least
UNSEEN = len(TEXT) - 2 * 256 - DRAFT_WINDOW  # of the first ones, at least


@pytest.fixture
def model(tiny: Callable[..., Path], open_model: Callable[..., Model]) -> Model:
    """Of one layer: its keys and values are of single tokens, and know nothing of others."""
    return open_model(tiny("llama", n_layer=1, n_ctx=N_CTX), n_ctx=N_CTX)


def after(model: Model, text: Sequence[int], subnetwork: SubNetwork | None) -> Any:
    """Logits of a draft's first token after a text."""
    model.clear()
    model.decode(text)
    model.decode_tree([7], [-1], subnetwork=subnetwork)
    logits = model.logits(0)
    model.rollback(len(text))
    return logits


def windowed(model: Model, n: int = DRAFT_WINDOW) -> SubNetwork:
    return SubNetwork(n_layer=model.n_layer, window=n)


def changed(at: int) -> list[int]:
    return [*TEXT[:at], 99, *TEXT[at + 1 :]]


@pytest.mark.parametrize("at", [0, 1, UNSEEN])
def test_what_lies_before_it_makes_no_difference(at: int, model: Model) -> None:
    near = windowed(model)
    np.testing.assert_array_equal(after(model, changed(at), near), after(model, TEXT, near))
    assert (after(model, changed(at), None) != after(model, TEXT, None)).any()


@pytest.mark.parametrize("at", [len(TEXT) - SEEN, len(TEXT) - 1])
def test_what_lies_in_it_does(at: int, model: Model) -> None:
    near = windowed(model)
    assert (after(model, changed(at), near) != after(model, TEXT, near)).any()


def test_a_short_text_is_seen_whole(model: Model) -> None:
    text = TEXT[: DRAFT_WINDOW + 255]
    np.testing.assert_array_equal(
        after(model, text, windowed(model)), after(model, text, SubNetwork(n_layer=1))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_leaves_no_trace(
    family: str, tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    """Trees of several tokens, chunk by chunk, with attention left out in some layers."""
    model = open_model(tiny(family, n_ctx=N_CTX), n_ctx=N_CTX)
    skipping = SubNetwork(n_layer=model.n_layer, skip_attn=frozenset([1]), window=1)
    whole = after(model, TEXT, None)
    for _ in range(2):
        model.decode_tree([7, 8, 9], [-1, 0, 0], subnetwork=skipping)
        model.decode_tree([10], [2], subnetwork=skipping)
        assert np.isfinite(model.logits(0)).all()
        model.rollback(len(TEXT))
    model.decode([7])
    np.testing.assert_array_equal(model.logits(0), whole)


def test_it_reads_less(model: Model) -> None:
    row = 2 * 2 * 16 * 2  # K and V, two heads of 16, F16
    assert model.pass_cost(windowed(model), n_kv=2000).kv_bytes == (DRAFT_WINDOW + 256) * row
    assert model.pass_cost(windowed(model), n_kv=100).kv_bytes == 100 * row
    assert model.pass_cost(n_kv=2000).kv_bytes == 2000 * row
    assert model.can_look_back_less


def test_passes_of_drafts_have_it(model: Model) -> None:
    model.decode(TEXT)
    passes = Passes("layer-skip", model, SubNetwork(n_layer=1))
    offers = []
    for first in (TEXT[0], 99):
        model.clear()
        model.decode([first, *TEXT[1:]])
        passes.begin(7)
        offers.append(passes.offers(Tree(), -1, 5))
        passes.end()
    assert offers[0] == offers[1]


@pytest.mark.parametrize(
    ("family", "options"),
    [("gemma3", {}), ("llama", {"flash_attn": False}), ("llama", {"n_ctx": 512}), ("mamba", {})],
    ids=["two kinds of cache", "no flash attention", "a short context", "no cache"],
)
def test_where_it_spares_nothing(
    family: str,
    options: dict[str, Any],
    tiny: Callable[..., Path],
    open_model: Callable[..., Model],
) -> None:
    model = open_model(tiny(family, n_ctx=N_CTX), **{"n_ctx": N_CTX} | options)
    assert not model.can_look_back_less
