"""What leaving out single sub-layers costs in agreement: a linear model of its logarithm.

    log agreement(S) = - sum of harm_l over the skipped sub-layers l

holds roughly while harms are small (each is another chance to go astray), and makes every scored
sub-network evidence on all the sub-layers it skips.  Bayesian linear regression with a Gaussian
prior (Bishop 2006, §3.3), so that proposals can be Thompson samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swift_gguf.search.objective import Costs
from swift_gguf.search.space import Space
from swift_gguf.subnetwork import SubNetwork


@dataclass
class Scored:
    """What is known of one sub-network."""

    subnetwork: SubNetwork
    positions: float = 0.0
    """How many were seen; a fraction where evidence has aged."""
    agreements: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """Everything a proposal may draw on; `incumbent` is the best sub-network so far."""

    space: Space
    costs: Costs
    incumbent: SubNetwork
    scored: Sequence[Scored]
    draft_max: int

    @cached_property
    def harms(self) -> Harms:
        """What single sub-layers cost in agreement."""
        return estimate(self.space, self.scored)

    @cached_property
    def savings_ms(self) -> NDArray[Any]:
        """[space.size], what a draft token gets cheaper by; never zero, so that it can divide."""
        full = self.costs.draft_ms(SubNetwork(n_layer=self.space.n_layer))
        left = np.array([self.costs.draft_ms(single) for single in self.space.singles()])
        return np.asarray(np.maximum(full - left, 1e-6 * full))


@dataclass(frozen=True)
class Harms:
    """The posterior: a Gaussian."""

    mean: NDArray[Any]
    """[size]"""
    root: NDArray[Any]
    """[size, size], root @ root.T is the covariance."""

    def sample(self, rng: np.random.Generator) -> NDArray[Any]:
        """A tempered Thompson sample [size]; leaving something out does not help: never below 0."""
        noise = self.root @ rng.standard_normal(len(self.mean))
        return np.maximum(self.mean + TEMPERATURE * noise, 0.0)


# Prior of a harm, and its spread: common to a kind, shared with neighbours in depth, its own.  Even
# patterns on a 1.5B cost .012 to .022 a sub-layer (docs/lab/search.md).
PRIOR_MEAN = 0.015
PRIOR_SPREADS = (0.01, 0.01, 0.02)
NEIGHBOURHOOD = 3.0  # layers
# Errors beyond counting: neighbouring positions are alike (so a position counts half), texts differ
# in difficulty and harms do not quite add up (a share of what is explained).
DESIGN_EFFECT = 2.0
MISFIT = 0.25
# Full Thompson samples are too optimistic in many dimensions: a set is then chosen for all the
# sub-layers whose harm happens to be drawn low.
TEMPERATURE = 0.15


def estimate(space: Space, scored: Sequence[Scored]) -> Harms:
    """Harms given what was scored; without any, the prior's."""
    mean, precision = np.full(space.size, PRIOR_MEAN), np.linalg.inv(_prior_covariance(space))
    if scored:
        skip = np.array([space.mask(item.subnetwork) for item in scored], dtype=float)
        n = np.array([item.positions for item in scored])
        agreement = (np.array([item.agreements for item in scored]) + 0.5) / (n + 1)
        harm = -np.log(agreement)
        variance = DESIGN_EFFECT * (1 - agreement) / (agreement * (n + 1)) + (MISFIT * harm) ** 2
        weighted = skip.T / variance
        shift = weighted @ (harm - skip @ mean)
        precision = precision + weighted @ skip
        mean = mean + np.linalg.solve(precision, shift)
    return Harms(mean, np.linalg.inv(np.linalg.cholesky(precision)).T)


def _prior_covariance(space: Space) -> NDArray[Any]:
    depth = np.array([*space.attn, *space.ffn], dtype=float)
    kind = np.arange(space.size) < len(space.attn)
    same = (kind[:, None] == kind).astype(float)
    near = np.exp(-np.abs(depth[:, None] - depth) / NEIGHBOURHOOD)
    common, shared, own = (spread**2 for spread in PRIOR_SPREADS)
    covariance: NDArray[Any] = same * (common + shared * near) + own * np.eye(space.size)
    return covariance
