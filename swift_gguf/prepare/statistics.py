"""Statistics that are collected while the model decodes its calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Energy:
    """The sum of squared activations of every neuron."""

    def __init__(self, n_layer: int) -> None:
        self.squares: list[NDArray[np.float64] | None] = [None] * n_layer

    def __call__(self, layer: int, inputs: Floats, activations: Floats, output: Floats) -> None:
        """Adds one pass; see `Library.observe_ffn`."""
        squares = np.einsum("ij,ij->j", activations, activations).astype(np.float64)
        known = self.squares[layer]
        self.squares[layer] = squares if known is None else known + squares


class TokenMass:
    """How often each token is expected: the sum of the model's probabilities over positions.

    The probabilities at a few thousand positions cover most of the likely tokens; the drawn tokens
    alone are only a few hundred different ones.
    """

    def __init__(self, n_vocab: int) -> None:
        self.mass = np.zeros(n_vocab, np.float64)

    def add(self, logits: Floats) -> None:
        """Adds one position: logits [n_vocab]."""
        p = np.exp(logits - logits.max())
        self.mass += p / p.sum()


@dataclass
class Normal:
    """A least-squares problem: find D that minimises |A D - Y|^2, summed over tokens.

    A's last column is 1, for a bias.
    """

    gram: Floats
    """A' A, [k + 1, k + 1]."""
    cross: Floats
    """A' Y, [k + 1, n_embd]."""
    power: float = 0.0
    """|Y|^2."""

    @classmethod
    def empty(cls, k: int, n_embd: int) -> Normal:
        return cls(np.zeros((k + 1, k + 1), np.float32), np.zeros((k + 1, n_embd), np.float32))

    def add(self, activations: Floats, output: Floats) -> None:
        """Adds n tokens: [n, k] and [n, n_embd]."""
        a = np.hstack([activations, np.ones((len(activations), 1), np.float32)])
        self.gram += a.T @ a
        self.cross += a.T @ output
        self.power += float(np.einsum("ij,ij->", output, output))

    def error(self, columns: Floats) -> float:
        """|Y - A D|^2 / |Y|^2 for D = columns [k + 1, n_embd]."""
        fit = np.einsum("ij,ij->", columns, self.gram @ columns, dtype=np.float64)
        fit -= 2 * np.einsum("ij,ij->", columns, self.cross, dtype=np.float64)
        return 1.0 + float(fit) / max(self.power, 1e-30)


class NormalEquations:
    """Accumulates the normal equations of every layer, with the whole FFN's output as target.

    Observed passes are stored, and `settle` adds them later: if numpy and ggml computed at the same
    time, their threads would wait for each other.
    """

    def __init__(
        self,
        kept: Mapping[int, NDArray[np.int64]],
        n_embd: int,
        judged: frozenset[int],
        *,
        with_inputs: frozenset[int] = frozenset(),
    ) -> None:
        """
        kept: for each layer, the neurons whose activations explain the output.
        judged: the layers whose error is measured on held-back text.
        with_inputs: the layers where the FFN's inputs explain the output, too, after the neurons.
        """
        self._kept, self._with_inputs = kept, with_inputs
        self._seen: list[tuple[int, Floats, Floats]] = []

        def empty(layer: int) -> Normal:
            return Normal.empty(len(kept[layer]) + n_embd * (layer in with_inputs), n_embd)

        self.fitted = {layer: empty(layer) for layer in kept}
        self.judged = {layer: empty(layer) for layer in judged}

    def __call__(self, layer: int, inputs: Floats, activations: Floats, output: Floats) -> None:
        """Stores one pass; see `Library.observe_ffn`."""
        if layer in self.fitted:
            known = activations[:, self._kept[layer]]
            if layer in self._with_inputs:
                known = np.hstack([known, inputs])
            self._seen.append((layer, known, output.copy()))

    def settle(self, *, is_held_back: bool) -> None:
        """Adds the stored passes to the equations."""
        into = self.judged if is_held_back else self.fitted
        for layer, known, output in self._seen:
            if layer in into:
                into[layer].add(known, output)
        self._seen.clear()


def refit(problem: Normal, original: Floats, strength: float) -> Floats:
    """Ridge regression towards the original columns [k, n_embd]; the bias is free:

        D = argmin |Y - A D|^2 + strength * sum_j g_j |D_j - original_j|^2,   g = diag(A' A)

    The penalty of each neuron is scaled by its own activations, so the strength has no unit.
    Returns [k + 1, n_embd].
    """
    weight = strength * np.maximum(np.diag(problem.gram).astype(np.float64), 1e-12)
    weight[-1] *= 1e-6 / strength
    left = problem.gram.astype(np.float64)
    left[np.diag_indices_from(left)] += weight
    right = problem.cross.astype(np.float64)
    right[:-1] += weight[:-1, None] * original
    return np.linalg.solve(left, right).astype(np.float32)
