"""What is counted while a model runs over its calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Energy:
    """Sum of squared activations of every neuron: how much each contributes, before its column."""

    def __init__(self, n_layer: int) -> None:
        self.squares: list[NDArray[np.float64] | None] = [None] * n_layer

    def __call__(self, layer: int, inputs: Floats, activations: Floats, output: Floats) -> None:
        """Counts one pass; see `Library.observe_ffn`."""
        squares = np.einsum("ij,ij->j", activations, activations).astype(np.float64)
        known = self.squares[layer]
        self.squares[layer] = squares if known is None else known + squares


class TokenMass:
    """How often each token is to be expected: the sum of the model's own probabilities.

    Thousands of positions show most of a vocabulary's likely tokens, where counts of what was said
    show a few hundred.
    """

    def __init__(self, n_vocab: int) -> None:
        self.mass = np.zeros(n_vocab, np.float64)

    def add(self, logits: Floats) -> None:
        """One position: [n_vocab]."""
        p = np.exp(logits - logits.max())
        self.mass += p / p.sum()


@dataclass
class Normal:
    """A least-squares problem: which D makes A D nearest to Y, summed over tokens.

    A's last column is 1: what no neuron explains goes to a bias.
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
        """Tokens: [n, k] and [n, n_embd]."""
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
    """Streams the normal equations of every layer against the whole FFN's output.

    What is observed is set aside, and counted by `settle`: numpy and ggml in turns, since their
    threads would wait for each other.
    """

    def __init__(
        self,
        kept: Mapping[int, NDArray[np.int64]],
        n_embd: int,
        judged: frozenset[int],
        *,
        with_inputs: frozenset[int] = frozenset(),
    ) -> None:
        """kept: neurons by layer, whose activations explain the output; of the layers
        `with_inputs` the FFN's own inputs do, too, after them.
        judged: layers that held-back text is counted for."""
        self._kept, self._with_inputs = kept, with_inputs
        self._seen: list[tuple[int, Floats, Floats]] = []

        def empty(layer: int) -> Normal:
            return Normal.empty(len(kept[layer]) + n_embd * (layer in with_inputs), n_embd)

        self.fitted = {layer: empty(layer) for layer in kept}
        self.judged = {layer: empty(layer) for layer in judged}

    def __call__(self, layer: int, inputs: Floats, activations: Floats, output: Floats) -> None:
        """Sets one pass aside; see `Library.observe_ffn`."""
        if layer in self.fitted:
            known = activations[:, self._kept[layer]]
            if layer in self._with_inputs:
                known = np.hstack([known, inputs])
            self._seen.append((layer, known, output.copy()))

    def settle(self, *, is_held_back: bool) -> None:
        """Counts what was set aside."""
        into = self.judged if is_held_back else self.fitted
        for layer, known, output in self._seen:
            if layer in into:
                into[layer].add(known, output)
        self._seen.clear()


def refit(problem: Normal, original: Floats, strength: float) -> Floats:
    """Ridge regression towards the original columns [k, n_embd]; the bias is free:

        D = argmin |Y - A D|^2 + strength * sum_j g_j |D_j - original_j|^2,   g = diag(A' A)

    Each neuron is held by as much as its own activations weigh, so the strength has no unit.
    Returns [k + 1, n_embd].
    """
    weight = strength * np.maximum(np.diag(problem.gram).astype(np.float64), 1e-12)
    weight[-1] *= 1e-6 / strength
    left = problem.gram.astype(np.float64)
    left[np.diag_indices_from(left)] += weight
    right = problem.cross.astype(np.float64)
    right[:-1] += weight[:-1, None] * original
    return np.linalg.solve(left, right).astype(np.float32)
