"""A linear path of low rank beside the neurons that are kept: most of what the others put out.

However a neuron's activation bends, its best linear fit explains much of it, and thousands of
neurons together need few directions.  By reduced-rank regression (Izenman 1975): fit the FFN's
output by the kept neurons and the FFN's input, and keep the directions in which the input's part
of the fit has most power.

Such a path needs no operation of its own.  A gate that is held open passes its neuron on: silu,
gelu and relu are the identity far to the right, so a neuron with a gate of weights 0 and bias
`OPEN` puts out `OPEN` times its up projection.  The path is so many more neurons.
"""

from __future__ import annotations

import numpy as np

from swift_gguf.prepare.statistics import Floats, Normal, refit

OPEN = 16.0
"""silu(16) is 16 to one part in ten million; gelu and relu are exact."""


def directions(
    problem: Normal, original: Floats, strength: float, rank: int
) -> tuple[Floats, Floats]:
    """What the path reads of the FFN's input, and what it first puts out.

    problem: of k neurons and the d inputs after them.
    original: [k, n_embd], the neurons' columns.

    Returns rows [rank, d], each of unit power over the text, and their columns [rank, n_embd].
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
    """The same problem with the inputs, if any, seen through `rows` only: of k + rank."""

    def seen(matrix: Floats) -> Floats:
        inputs = [rows @ matrix[k:-1]] if len(rows) else []
        return np.vstack([matrix[:k], *inputs, matrix[-1:]])

    return Normal(seen(seen(problem.gram).T), seen(problem.cross), problem.power)
