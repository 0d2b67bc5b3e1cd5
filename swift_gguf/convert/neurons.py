"""Sorts the neurons of every FFN by importance, which changes no function.

An FFN is a sum over its neurons, and a sum has no order: rows of gate and up and columns of down
are moved alike.  Afterwards the first k neurons are the k that matter most, so that a narrow FFN
is the beginning of the whole one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray

from swift_gguf.convert.steps import Report
from swift_gguf.errors import ConvertError
from swift_gguf.prepare.narrowing import Ffn, ffns_of, most_important
from swift_gguf.prepare.statistics import Energy
from swift_gguf.prepare.weights import PLAIN, Weights

Order = NDArray[np.int64]


def orders(weights: Weights, energy: Energy, n_layer: int) -> dict[int, Order]:
    """By layer, the neurons in order of importance; of dense FFNs whose matrices are plain."""
    ffns = sortable(weights, n_layer)
    return {ffn.layer: most_important(weights, ffn, energy, ffn.n_ff) for ffn in ffns}


def sortable(weights: Weights, n_layer: int) -> list[Ffn]:
    """
    Raises:
        ConvertError: there is no FFN that could be sorted.
    """
    ffns = ffns_of(weights, n_layer)
    if not ffns:
        raise ConvertError("no neurons to sort: this model has no dense FFN")
    if any(weights.kind(ffn.name("down")) not in PLAIN for ffn in ffns):
        raise ConvertError("quantised weights cannot be sorted; use --outtype f16, bf16 or f32")
    return ffns


def sort_file(path: Path, orders: dict[int, Order], *, report: Report = lambda *_: None) -> None:
    """Sorts the FFNs of a GGUF where they lie; the file is not whole until it is done."""
    ffns = {ffn.layer: ffn for ffn in ffns_of(Weights(path), max(orders) + 1)}
    reader = GGUFReader(path, "r+")
    tensors: dict[str, NDArray[Any]] = {tensor.name: tensor.data for tensor in reader.tensors}
    for number, (layer, order) in enumerate(sorted(orders.items())):
        ffn = ffns[layer]
        for suffix in ("weight", "bias"):
            _move(tensors, ffn.name("up", suffix), ffn.rows(order), axis=0)
            _move(tensors, ffn.name("gate", suffix), order, axis=0)
        _move(tensors, ffn.name("sub_norm"), order, axis=0)
        _move(tensors, ffn.name("down"), order, axis=1)
        report("sorting neurons", number + 1, len(orders), "layers")
    reader.data.flush()


def _move(tensors: dict[str, NDArray[Any]], name: str, order: Order, *, axis: int) -> None:
    if name not in tensors:
        return
    data = tensors[name]
    if data.dtype == np.uint8:  # gguf-py has no BF16: two bytes each
        data = data.view(np.uint16)
    data[...] = np.take(data, order, axis=axis)
