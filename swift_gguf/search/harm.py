"""The harm of skipping a sub-layer: a linear model of the logarithm of the agreement.

    log agreement(S) = - sum of harm_l over the skipped sub-layers l

This holds roughly while harms are small.  With it, every scored sub-network is evidence about all
sub-layers that it skips.  The model is a Bayesian linear regression with a Gaussian prior (Bishop
2006, §3.3), so that proposals can be Thompson samples.
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
    """The results of one sub-network."""

    subnetwork: SubNetwork
    positions: float = 0.0
    """The number of scored positions.  It is a fraction after evidence has aged."""
    agreements: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """Everything that a proposer may use.

    incumbent: the best sub-network so far.
    """

    space: Space
    costs: Costs
    incumbent: SubNetwork
    scored: Sequence[Scored]
    draft_max: int

    @cached_property
    def harms(self) -> Harms:
        """The harms of the sub-layers."""
        return estimate(self.space, self.scored)

    @cached_property
    def savings_ms(self) -> NDArray[Any]:
        """[space.size], milliseconds that skipping a sub-layer saves in a draft token.

        They are never 0, because harms are divided by them.
        """
        full = self.costs.draft_ms(SubNetwork(n_layer=self.space.n_layer))
        left = np.array([self.costs.draft_ms(single) for single in self.space.singles()])
        return np.asarray(np.maximum(full - left, 1e-6 * full))


@dataclass(frozen=True)
class Harms:
    """The posterior of the harms, a Gaussian."""

    mean: NDArray[Any]
    """[size]"""
    root: NDArray[Any]
    """[size, size], root @ root.T is the covariance."""

    def sample(self, rng: np.random.Generator) -> NDArray[Any]:
        """A tempered Thompson sample [size].  It is never below 0: skipping does not help."""
        noise = self.root @ rng.standard_normal(len(self.mean))
        return np.maximum(self.mean + TEMPERATURE * noise, 0.0)


# The prior of a harm.  Its spread has three parts: one common to a kind of sub-layer, one shared
# with neighbours in depth, and one of the sub-layer itself.  Even patterns on a 1.5B model have
# harms of .012 to .022 for each sub-layer (docs/lab/search.md).
PRIOR_MEAN = 0.015
PRIOR_SPREADS = (0.01, 0.01, 0.02)
NEIGHBOURHOOD = 3.0  # layers
# Further errors.  Neighbouring positions are alike, so a position counts half.  Texts differ in
# difficulty, and harms do not quite add up; this error is a share of the harm.
DESIGN_EFFECT = 2.0
MISFIT = 0.25
# Full Thompson samples are too optimistic in many dimensions: the best set would consist of all
# sub-layers whose sampled harm happens to be low.
TEMPERATURE = 0.15


def estimate(space: Space, scored: Sequence[Scored]) -> Harms:
    """The harms given the scored sub-networks.  Without any, they are those of the prior."""
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
