"""Which neurons of an FFN are kept, and what they are made to put out.

A neuron's importance is the energy it adds to the FFN's output when neurons are taken to be
independent: sum over tokens of its squared activation, times its squared down column.  The down
columns of those kept are then refitted to the whole FFN's output (`statistics.refit`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swift_gguf.prepare.statistics import Energy, Normal, refit
from swift_gguf.prepare.weights import Weights

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge; held-back text says which


@dataclass(frozen=True)
class Ffn:
    """Names of one layer's tensors, and their shapes."""

    layer: int
    n_ff: int
    n_embd: int
    has_gate: bool
    is_joined: bool
    """Gate and up in one matrix, the gate's rows first."""

    def name(self, part: str, suffix: str = "weight") -> str:
        return f"blk.{self.layer}.ffn_{part}.{suffix}"

    def rows(self, neurons: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of `ffn_up` that these neurons have."""
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
    """[n_narrow], neurons in order of importance."""
    squares = energy.squares[ffn.layer]
    assert squares is not None  # the model ran
    columns = weights.values(ffn.name("down"))
    importance = squares * np.einsum("ij,ij->j", columns, columns)
    return np.argsort(-importance, kind="stable")[:n_narrow]


def best_strength(
    problems: dict[int, Normal],
    judged: dict[int, Normal],
    originals: dict[int, NDArray[np.float32]],
) -> tuple[float, dict[float, float]]:
    """The ridge that suits text it was not fitted to best, over the layers that were judged.

    Returns it, and the mean relative error by strength (0.0: the original columns).
    """
    errors = {
        strength: float(
            np.mean(
                [
                    problem.error(refit(problems[layer], originals[layer], strength))
                    for layer, problem in judged.items()
                ]
            )
        )
        for strength in STRENGTHS
    }
    best = min(errors, key=errors.__getitem__)
    unbiased = {layer: np.vstack([d, np.zeros_like(d[:1])]) for layer, d in originals.items()}
    errors[0.0] = float(np.mean([p.error(unbiased[layer]) for layer, p in judged.items()]))
    return best, errors
