"""A synthetic model to search on: planted harms, interactions, correlated and paired noise."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swift_gguf.search.objective import Objective, Outcome
from swift_gguf.search.space import Space
from swift_gguf.subnetwork import SubNetwork

# Relative to plain decoding: Qwen2.5-Coder-1.5B Q4_K_M on 2 cores. Width 4 beats 3.
CPU = (95.0, 146.0, 178.0, 154.0, 190.0, 220.0, 250.0, 277.0, 290.0)
# Made up: a machine where width is nearly free, so that longer drafts pay.
GPU = (95.0, 98.0, 104.0, 100.0, 107.0, 110.0, 113.0, 112.0, 115.0)
HEAD_MS = 18.0


@dataclass(frozen=True)
class SyntheticCosts:
    """FFNs are dear and attention is cheap; verification is not monotone in its width."""

    n_layer: int
    attn_ms: float = 13.0
    ffn_ms: float = 64.0
    verify: tuple[float, ...] = GPU

    def draft_ms(self, subnetwork: SubNetwork) -> float:
        attn = 1 - len(subnetwork.skip_attn) / self.n_layer
        ffn = 1 - len(subnetwork.skip_ffn) / self.n_layer
        return HEAD_MS + attn * self.attn_ms + ffn * self.ffn_ms

    def verify_ms(self, width: int) -> float:
        return self.verify[width - 1]


@dataclass(frozen=True)
class SyntheticModel:
    """Position i agrees with probability exp(-difficulty_i * harm(S)).

    harm is the sum of what is planted, more where neighbouring FFNs are out together, and much more
    where attention and FFNs both are, as measured on Qwen2.5-Coder-1.5B.
    Difficulties are autocorrelated; what agrees is positively correlated among sub-networks, as
    they are asked about the same positions.
    """

    space: Space
    harms: NDArray[Any]
    """[space.size]"""
    interaction: float = 1.0
    """How far harms are from adding up; 0: they do."""
    verify: tuple[float, ...] = GPU

    @classmethod
    def plant(
        cls, space: Space, seed: int, *, no_ops: int = 0, verify: tuple[float, ...] = GPU
    ) -> SyntheticModel:
        rng = np.random.default_rng((1, seed))
        depth = np.array([*space.attn, *space.ffn]) / space.n_layer
        scale = np.where(np.arange(space.size) < len(space.attn), 0.012, 0.02)
        ends = 1 + 6 * np.exp(-12 * depth) + 3 * np.exp(-12 * (1 - depth))
        harms = scale * ends * rng.lognormal(0, 0.9, space.size)
        harms[rng.choice(space.size, no_ops, replace=False)] = 0.0
        return cls(space, harms, interaction=0.0 if no_ops else 1.0, verify=verify)

    @cached_property
    def costs(self) -> SyntheticCosts:
        return SyntheticCosts(self.space.n_layer, verify=self.verify)

    def harm(self, subnetwork: SubNetwork) -> float:
        ffn = subnetwork.skip_ffn
        pairs = sum(layer + 1 in ffn for layer in ffn)
        planted = self.harms[self.space.mask(subnetwork)].sum()
        n = self.space.n_layer
        both = len(subnetwork.skip_attn) / n * len(ffn) / n
        return float(planted + self.interaction * (0.01 * pairs + 4.0 * both))

    def outcome(self, subnetwork: SubNetwork, n: int, seed: int) -> Outcome:
        difficulty, common = _text(n, seed)
        mask = np.packbits(self.space.mask(subnetwork)).tobytes()
        own = np.random.default_rng((3, seed, int.from_bytes(mask, "big")))
        p = np.exp(-difficulty * self.harm(subnetwork))
        draw = 0.8 * common + 0.6 * own.standard_normal(n)
        logit = np.log((p + 1e-3) / (1 - p + 1e-3)) + 0.7 * own.standard_normal(n)
        agrees = _normal_cdf(draw) < p
        return Outcome(agrees, (1 / (1 + np.exp(-logit))).astype(np.float32))

    def true_rate(self, subnetwork: SubNetwork) -> float:
        """On ten thousand positions that no search sees."""
        if subnetwork not in self._rates:
            self._rates[subnetwork] = self._true_rate(subnetwork)
        return self._rates[subnetwork]

    def _true_rate(self, subnetwork: SubNetwork) -> float:
        outcomes = [self.outcome(subnetwork, 1000, 10**6 + i) for i in range(10)]
        return Objective(costs=self.costs).rate(subnetwork, outcomes).value

    _rates: dict[SubNetwork, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class SyntheticWindow:
    model: SyntheticModel
    seed: int
    n: int = 32

    @property
    def key(self) -> Hashable:
        return self.seed

    def score(self, subnetwork: SubNetwork) -> Outcome:
        return self.model.outcome(subnetwork, self.n, self.seed)


@lru_cache(maxsize=256)
def _text(n: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Of each position: how hard it is (mean about 1), and luck that all sub-networks share."""
    rng = np.random.default_rng((2, seed))
    level = 0.3 * rng.standard_normal()  # texts differ
    state, noise = rng.standard_normal(), np.empty(n)
    for i, kick in enumerate(rng.standard_normal(n)):
        state = 0.5 * state + np.sqrt(0.75) * kick
        noise[i] = state
    return np.exp(noise + level - 0.5), rng.standard_normal(n)


def _normal_cdf(x: NDArray[Any]) -> NDArray[Any]:
    # logistic approximation, within 0.01
    return np.asarray(1 / (1 + np.exp(-1.702 * x)))
