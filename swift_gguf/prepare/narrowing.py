"""Chooses the neurons of a narrow FFN, and refits their down columns.

A neuron's importance is the energy that it adds to the FFN's output if neurons are independent: the
sum over tokens of its squared activation, times its squared down column.  The down columns of the
kept neurons are refitted to the whole FFN's output (`statistics.refit`), together with a linear
path of low rank (`low_rank`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swift_gguf.prepare.low_rank import directions, through
from swift_gguf.prepare.statistics import Energy, Normal, refit
from swift_gguf.prepare.weights import Weights

STRENGTHS = (0.1, 0.3, 1.0, 3.0)  # of the ridge; held-back text decides which one is used


@dataclass(frozen=True)
class Ffn:
    """The names and shapes of one layer's FFN tensors."""

    layer: int
    n_ff: int
    n_embd: int
    has_gate: bool
    is_joined: bool
    """Gate and up are one matrix; the gate's rows come first."""

    def name(self, part: str, suffix: str = "weight") -> str:
        return f"blk.{self.layer}.ffn_{part}.{suffix}"

    def rows(self, neurons: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of `ffn_up` that belong to these neurons."""
        return np.concatenate([neurons, neurons + self.n_ff]) if self.is_joined else neurons


def ffns_of(weights: Weights, n_layer: int) -> list[Ffn]:
    """Every dense FFN that can be narrowed."""
    found = []
    for layer in range(n_layer):
        down, up = f"blk.{layer}.ffn_down.weight", f"blk.{layer}.ffn_up.weight"
        scaled = any(
            weights.has(f"blk.{layer}.ffn_{part}.scale") for part in ("up", "gate", "down")
        )
        scaled = scaled or weights.has(f"blk.{layer}.ffn.act.scales")
        if not (weights.has(down) and weights.has(up)) or scaled:
            continue
        n_embd, n_ff = weights.shape(down)
        n_up = weights.shape(up)[0]
        if n_up in (n_ff, 2 * n_ff):
            has_gate = weights.has(f"blk.{layer}.ffn_gate.weight")
            found.append(Ffn(layer, n_ff, n_embd, has_gate, n_up == 2 * n_ff))
    return found


def most_important(weights: Weights, ffn: Ffn, energy: Energy, n_narrow: int) -> NDArray[np.int64]:
    """[n_narrow]: the most important neurons, most important first."""
    squares = energy.squares[ffn.layer]
    assert squares is not None  # the model ran
    columns = weights.values(ffn.name("down"))
    importance = squares * np.einsum("ij,ij->j", columns, columns)
    return np.argsort(-importance, kind="stable")[:n_narrow]


@dataclass(frozen=True)
class Fit:
    """The fitted weights that replace a whole FFN."""

    rows: NDArray[np.float32]
    """[rank, n_embd]: the rows of the linear path (`low_rank`); [0, n_embd] without a path."""
    columns: NDArray[np.float32]
    """[k + rank + 1, n_embd]: the columns of the kept neurons, of the path, and a bias."""

    def error(self, problem: Normal) -> float:
        """Relative error on other text: |Y - A D|^2 / |Y|^2."""
        k = len(self.columns) - 1 - len(self.rows)
        return through(problem, self.rows, k).error(self.columns)


@dataclass(frozen=True)
class Narrow:
    """A narrow FFN: the kept neurons and the fit."""

    ffn: Ffn
    neurons: NDArray[np.int64]
    """[k], in the order in which they are stored."""
    fit: Fit | None = None
    """None: all neurons are kept, with their original columns."""

    @property
    def width(self) -> int:
        """Number of neurons, including those of the linear path."""
        return len(self.neurons) + (len(self.fit.rows) if self.fit else 0)


def fit(
    problem: Normal,
    original: NDArray[np.float32],
    strength: float,
    *,
    rank: int = 0,
    stored: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda rows: rows,
) -> Fit:
    """Refits the kept neurons' columns, together with a linear path of the given rank.

    problem: with the k neurons and, for a path, the FFN's inputs after them.
    stored: quantises and dequantises the path's rows; the columns are fitted to the result.
    """
    rows, start = np.zeros((0, original.shape[1]), np.float32), np.zeros_like(original[:0])
    if rank:
        rows, start = directions(problem, original, strength, rank)
        rows = stored(rows)
    seen = through(problem, rows, len(original))
    return Fit(rows, refit(seen, np.vstack([original, start]), strength))


def best_strength(
    problems: dict[int, Normal],
    judged: dict[int, Normal],
    originals: dict[int, NDArray[np.float32]],
    ranks: Mapping[int, int],
) -> tuple[float, dict[float, float]]:
    """Finds the ridge strength with the smallest error on held-back text of the judged layers.

    Returns it, and the mean relative error of each strength (0.0: the original columns).
    """

    def error(strength: float, layer: int) -> float:
        found = fit(problems[layer], originals[layer], strength, rank=ranks[layer])
        return found.error(judged[layer])

    errors = {
        strength: float(np.mean([error(strength, layer) for layer in judged]))
        for strength in STRENGTHS
    }
    best = min(errors, key=errors.__getitem__)
    errors[0.0] = float(
        np.mean([_as_they_are(originals[layer]).error(p) for layer, p in judged.items()])
    )
    return best, errors


def _as_they_are(original: NDArray[np.float32]) -> Fit:
    n_embd = original.shape[1]
    bias = np.zeros((1, n_embd), np.float32)
    return Fit(np.zeros((0, n_embd), np.float32), np.vstack([original, bias]))
