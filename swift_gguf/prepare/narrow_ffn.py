"""Writes a narrow FFN: the rows of the kept neurons, then those of the linear path."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swift_gguf.prepare.low_rank import OPEN
from swift_gguf.prepare.narrowing import Narrow
from swift_gguf.prepare.weights import KindOf, Sidecar, Weights


def add_ffn(sidecar: Sidecar, weights: Weights, narrow: Narrow, kind_of: KindOf) -> None:
    """Adds all tensors of one narrow FFN."""
    ffn, neurons = narrow.ffn, narrow.neurons
    path = narrow.fit.rows if narrow.fit else np.zeros((0, ffn.n_embd), np.float32)
    parts = [("up", ffn.rows(neurons), path, 0.0)]
    if ffn.has_gate:
        parts.append(("gate", neurons, np.zeros_like(path), OPEN))
    for part, chosen, more, bias in parts:
        kind = kind_of(ffn.n_embd)
        sidecar.add_rows(ffn.name(part), weights, chosen, kind, more=more)
        _add_bias(sidecar, weights, ffn.name(part, "bias"), chosen, np.full(len(path), bias))
    _add_down(sidecar, weights, narrow, kind_of)


def _add_bias(
    sidecar: Sidecar,
    weights: Weights,
    name: str,
    rows: NDArray[np.int64],
    more: NDArray[np.float64],
) -> None:
    """Adds the model's bias of `rows`, followed by `more`; nothing if there is neither."""
    has_bias = weights.has(name)
    if has_bias or more.any():
        own = weights.values(name).reshape(-1)[rows] if has_bias else np.zeros(len(rows))
        sidecar.add_array(name, np.concatenate([own, more]).astype(np.float32))


def _add_down(sidecar: Sidecar, weights: Weights, narrow: Narrow, kind_of: KindOf) -> None:
    name, bias_name = narrow.ffn.name("down"), narrow.ffn.name("down", "bias")
    kind = kind_of(narrow.width)
    bias = weights.values(bias_name).reshape(-1) if weights.has(bias_name) else None
    if narrow.fit is None:
        sidecar.add_rows(name, weights, np.arange(narrow.ffn.n_embd), kind)
    else:
        columns = narrow.fit.columns.copy()
        columns[len(narrow.neurons) : -1] /= OPEN
        sidecar.add_values(name, columns[:-1].T, kind)
        bias = columns[-1] if bias is None else bias + columns[-1]
    if bias is not None:
        sidecar.add_array(bias_name, bias)
