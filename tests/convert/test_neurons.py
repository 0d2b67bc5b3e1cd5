"""Sorted neurons change nothing that a model says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray

from swift_gguf.convert import calibrate, neurons
from swift_gguf.errors import ConvertError
from swift_gguf.model.model import Model
from swift_gguf.prepare.narrowing import ffns_of, most_important
from swift_gguf.prepare.texts import Text
from swift_gguf.prepare.weights import Weights

TEXTS = [Text(prompt=list(range(40, 70)), answers=[list(range(70, 130))])]
REPORT: Callable[..., None] = lambda *_: None  # noqa: E731
TOKENS = list(range(20, 60))
ROUNDING = 5e-3  # sums in another order, in models that are chaotic; logits reach 10


def logits(model: Model) -> NDArray[np.float32]:
    model.clear()
    model.decode(TOKENS, n_outputs=len(TOKENS), exact=False)
    return np.array([model.logits(row) for row in range(len(TOKENS))])


def found_orders(path: Path, open_model: Callable[..., Model]) -> dict[int, neurons.Order]:
    model = open_model(path, sidecar=None)
    energy = calibrate.neuron_energy(model, TEXTS, REPORT)
    orders = neurons.orders(Weights(path), energy, model.n_layer)
    model.close()
    return orders


@pytest.mark.parametrize(
    ("family", "quant"),
    [("llama", None), ("llama", "F16"), ("gemma3", None), ("phi3", None), ("gpt2", None)],
)
def test_sorting_changes_no_logits_beyond_rounding(
    tiny: Callable[..., Path],
    open_model: Callable[..., Model],
    tmp_path: Path,
    family: str,
    quant: str | None,
) -> None:
    path = tiny(family, quant=quant)
    before = logits(open_model(path, exact_kv=True, flash_attn=False))
    orders = found_orders(path, open_model)
    assert all((order != np.arange(len(order))).any() for order in orders.values())
    sorted_file = tmp_path / "sorted.gguf"
    shutil.copy(path, sorted_file)
    neurons.sort_file(sorted_file, orders)
    assert sorted_file.read_bytes() != path.read_bytes()
    after = logits(open_model(sorted_file, exact_kv=True, flash_attn=False))
    rounding = ROUNDING if quant is None else 0.02  # llama.cpp rounds activations to F16 as well
    assert np.abs(after - before).max() <= rounding
    # sorted again, nothing would move: the order is that of importance
    for order in found_orders(sorted_file, open_model).values():
        moved = np.abs(order - np.arange(len(order)))
        assert moved.max() <= 4, "ties apart, neurons are not where they should be"


def test_a_sort_that_forgets_a_matrix_is_noticed(
    tiny: Callable[..., Path], open_model: Callable[..., Model], tmp_path: Path
) -> None:
    path = tiny("llama")
    before = logits(open_model(path, exact_kv=True, flash_attn=False))
    orders = found_orders(path, open_model)
    broken = tmp_path / "broken.gguf"
    shutil.copy(path, broken)
    down = ffns_of(Weights(path), 1)[0].name("down")
    neurons.sort_file(broken, orders)
    reader = GGUFReader(broken, "r+")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    neurons._move(tensors, down, np.argsort(orders[0]), axis=1)  # back again
    reader.data.flush()
    after = logits(open_model(broken, exact_kv=True, flash_attn=False))
    assert np.abs(after - before).max() > 20 * ROUNDING


def test_the_first_neurons_are_those_that_a_narrow_draft_keeps(
    tiny: Callable[..., Path], open_model: Callable[..., Model], tmp_path: Path
) -> None:
    path = tmp_path / "sorted.gguf"
    shutil.copy(tiny("llama"), path)
    neurons.sort_file(path, found_orders(path, open_model))
    model = open_model(path, sidecar=None)
    energy = calibrate.neuron_energy(model, TEXTS, REPORT)
    weights = Weights(path)
    for ffn in ffns_of(weights, model.n_layer):
        kept = most_important(weights, ffn, energy, ffn.n_ff // 4)
        first = set(range(ffn.n_ff // 4))
        assert len(first & {int(neuron) for neuron in kept}) >= len(first) - 1


@pytest.mark.parametrize(
    ("family", "quant", "words"),
    [("qwen3moe", None, "no dense FFN"), ("llama", "Q8_0", "quantised weights cannot be sorted")],
)
def test_what_cannot_be_sorted_is_refused(
    tiny: Callable[..., Path], family: str, quant: str | None, words: str
) -> None:
    with pytest.raises(ConvertError, match=words):
        neurons.sortable(Weights(tiny(family, quant=quant)), 4)
