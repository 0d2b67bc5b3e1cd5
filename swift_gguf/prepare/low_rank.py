"""A linear path of low rank beside the kept neurons: it replaces most of the others' output.

A linear fit explains much of each neuron's output, and thousands of neurons together need few
directions.  The method is reduced-rank regression (Izenman 1975): fit the FFN's output by the kept
neurons and the FFN's input, and keep the directions in which the input's part has most power.

The path is stored as additional neurons and needs no new operation.  silu, gelu and relu are the
identity for large inputs.  So a neuron whose gate has weights 0 and bias `OPEN` outputs `OPEN`
times its up projection.
"""

from __future__ import annotations

import numpy as np

from swift_gguf.prepare.statistics import Floats, Normal, refit

OPEN = 16.0
"""silu(16) is 16 with a relative error of 1e-7; gelu and relu are exact."""


def directions(
    problem: Normal, original: Floats, strength: float, rank: int
) -> tuple[Floats, Floats]:
    """The path's rows, and a first estimate of its columns.

    problem: with k neurons, followed by d inputs.
    original: [k, n_embd], the neurons' down columns.

    Returns rows [rank, d], each with unit power over the text, and columns [rank, n_embd].
    """
    k, n_embd = original.shape
    d = len(problem.gram) - 1 - k
    start = np.vstack([original, np.zeros((d, n_embd), np.float32)])
    linear = refit(problem, start, strength)[k : k + d]
    power = linear.T @ (problem.gram[k : k + d, k : k + d] @ linear)
    values, vectors = np.linalg.eigh(power.astype(np.float64))
    top = slice(None, -rank - 1, -1)  # ascending values
    n_tokens = max(float(problem.gram[-1, -1]), 1.0)
    sizes = np.sqrt(np.maximum(values[top], 1e-12) / n_tokens)
    outputs = vectors[:, top]
    rows = (linear @ outputs / sizes).T
    return rows.astype(np.float32), (outputs * sizes).T.astype(np.float32)


def through(problem: Normal, rows: Floats, k: int) -> Normal:
    """The same problem with the inputs projected by `rows`: k + rank variables."""

    def seen(matrix: Floats) -> Floats:
        inputs = [rows @ matrix[k:-1]] if len(rows) else []
        return np.vstack([matrix[:k], *inputs, matrix[-1:]])

    return Normal(seen(seen(problem.gram).T), seen(problem.cross), problem.power)
