"""Proposers of candidates for the search."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from swift_gguf.errors import SwiftError
from swift_gguf.search.harm import Evidence
from swift_gguf.search.space import Space
from swift_gguf.subnetwork import SubNetwork

MAX_MOVES = 6
LOG_WASTE = (np.log(0.5), np.log(1.2))  # the range of the random factor of harms


class Proposer(Protocol):
    """A source of candidates.  It has no state and uses only the evidence."""

    def propose(self, evidence: Evidence, rng: np.random.Generator) -> SubNetwork | None:
        """A candidate, which may have been scored before; None: there is no candidate."""
        ...


@dataclass(frozen=True)
class RandomSubset:
    """SWIFT's main source: a random subset with a share of all sub-layers (§4.1)."""

    skip_ratio: float

    def propose(self, evidence: Evidence, rng: np.random.Generator) -> SubNetwork | None:
        """See `Proposer.propose`."""
        return evidence.space.random(rng, int(evidence.space.size * self.skip_ratio))


class LocalMove:
    """The incumbent with some skipped sub-layers added, dropped or swapped.

    Often it changes one or two.  The effect of more changes is easier to tell from noise.
    Sub-layers with little harm for the time they save are skipped more often.
    """

    def propose(self, evidence: Evidence, rng: np.random.Generator) -> SubNetwork | None:
        """See `Proposer.propose`."""
        space = evidence.space
        price = evidence.harms.mean / evidence.savings_ms
        skip = space.mask(evidence.incumbent)
        add, drop = ((True, False), (False, True), (True, True))[rng.integers(3)]
        for _ in range(min(int(rng.geometric(0.4)), MAX_MOVES)):
            kept, skipped = np.flatnonzero(~skip), np.flatnonzero(skip)
            if add and len(kept):
                skip[_ranked_choice(kept, price[kept], rng)] = True
            if drop and len(skipped):
                skip[_ranked_choice(skipped, -price[skipped], rng)] = False
        return space.subnetwork(skip)


class HarmModel:
    """The best set of sub-layers to skip under a Thompson sample of the harms.

    Sub-layers are skipped in the order of harm per millisecond saved.  Their number maximises a
    simple form of the objective, where a is the agreement:

        rate = (1 + a + .. + a^d) / (d draft + verify(d + 1)),   or below plain decoding
        gain = (a + .. + a^d) / (d draft + verify(d + 1) - verify(1)),   at the best d

    Drafts that stop by confidence waste less than this, by an unknown factor.  So the harms are
    scaled by a random factor, which also varies the number of skipped sub-layers.
    """

    def propose(self, evidence: Evidence, rng: np.random.Generator) -> SubNetwork | None:
        """See `Proposer.propose`."""
        space, costs = evidence.space, evidence.costs
        harms = evidence.harms.sample(rng)
        # ties (harms of 0) go to the larger saving
        savings = evidence.savings_ms
        order = np.lexsort((-savings, harms / savings))
        lengths = np.arange(1, evidence.draft_max + 1)
        verify = np.array([costs.verify_ms(int(n) + 1) for n in lengths])
        waste = np.exp(rng.uniform(*LOG_WASTE))
        plain = costs.verify_ms(1)
        skip, best, best_value = np.zeros(space.size, dtype=bool), None, 0.0
        for sublayer in order:
            skip[sublayer] = True
            candidate = space.subnetwork(skip)
            agreement = np.exp(-waste * harms[skip].sum())
            gained = np.cumsum(agreement**lengths)
            cost = lengths * costs.draft_ms(candidate) + verify
            rates, gains = (1 + gained) / cost, gained / np.maximum(cost - plain, 1e-6)
            value = float(np.where(rates * plain >= 1, rates, gains).max())
            if value > best_value:
                best, best_value = candidate, value
        return best


def check_bayes_opt() -> None:
    """Checks that the package for `gaussian_process` is installed, before a search begins.

    Raises:
        SwiftError: it is not installed.
    """
    if find_spec("bayes_opt") is None:
        raise SwiftError(
            "Bayesian optimisation needs the bayesian-optimization package; "
            "run: pip install 'swift-gguf[search]'"
        )


def gaussian_process(
    space: Space,
    scored: Sequence[tuple[SubNetwork, float]],
    n_skip: int,
    rng: np.random.Generator,
) -> SubNetwork:
    """The `n_skip` sub-layers to skip that maximise the upper confidence bound (kappa 2.5).

    The Gaussian process (Matérn 5/2) is over [0, 1]^size.  The largest coordinates of its best
    point are taken.  Its time grows with the cube of the number of scored sub-networks: half a
    second for some hundreds.  It needs the package that `check_bayes_opt` checks.
    """
    from bayes_opt import BayesianOptimization
    from bayes_opt.acquisition import UpperConfidenceBound

    optimizer = BayesianOptimization(
        f=None,  # targets are registered, not called for
        pbounds={f"{i:04d}": (0.0, 1.0) for i in range(space.size)},
        acquisition_function=UpperConfidenceBound(kappa=2.5),
        random_state=int(rng.integers(2**31)),
        verbose=0,
    )
    values: dict[SubNetwork, list[float]] = {}
    for subnetwork, value in scored:
        values.setdefault(subnetwork, []).append(value)
    for subnetwork, repeated in values.items():  # without noise, a point has one value
        optimizer.register(space.mask(subnetwork).astype(float), float(np.mean(repeated)))
    with warnings.catch_warnings():  # scikit-learn warns of kernels at the bounds of their scale
        warnings.simplefilter("ignore")
        point = np.array(list(optimizer.suggest().values()))
    skip = np.zeros(space.size, dtype=bool)
    skip[np.argsort(-point)[:n_skip]] = True
    return space.subnetwork(skip)


def _ranked_choice(items: NDArray[Any], keys: NDArray[Any], rng: np.random.Generator) -> int:
    """A random one of `items`.  Small keys are more likely (harmonic weights of the ranks)."""
    weights = 1.0 / (1.0 + np.argsort(np.argsort(keys)))
    return int(rng.choice(items, p=weights / weights.sum()))
