"""What a sub-network is worth: expected tokens per second, from teacher-forced outcomes.

SWIFT maximises *matchness*, the share of positions where the draft's top-1 is the text's token
(§4.1).  That counts neither what a draft pass costs nor when drafting stops.  We maximise, over the
draft length d and the confidence p under which drafting stops,

    rate = sum_i tokens_i / sum_i cost_i
    tokens_i = 1 + min(A_i, drafted_i)                    drafted_i = min(C_i, d)
    cost_i = (drafted_i + [C_i < d]) draft + verify(drafted_i + 1)

where A_i and C_i count the agreeing and the confident positions from i on: the long-run rate of
cycles that begin anywhere (renewal-reward).  The last pass of a draft that stops by confidence is
paid though its token is not drafted.  Behind a wrong draft token the draft's own confidence is
unknown; the one on the true text stands in for it.

Where that is below plain decoding, maximising it would find the draft that costs next to nothing
and is never right: every cycle yields a token of the target's own.  So below plain, what counts is
the tokens gained for the time added to a plain pass,

    gain = sum_i (tokens_i - 1) / sum_i (cost_i - verify(1))

The rate passes plain's just where the gain does, so the two meet there, and a search that climbs
the gain climbs towards where speculation begins to pay.

A window is read as a ring: runs cut by its end go on at its start.  Leaving such starts out, or
only those whose end is not seen, would favour short runs; on a ring every position counts equally,
and only one seam of n is made up (the circular block bootstrap, Politis & Romano 1992).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from swift_gguf.subnetwork import SubNetwork

P_MIN_GRID = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
TINY_S = 1e-9  # costs are measured: a draft may seem to take no time at all


@dataclass(frozen=True)
class Outcome:
    """A sub-network's guesses at n >= 1 consecutive positions of a text.

    Raises:
        ValueError: the two arrays differ in length, or are empty.
    """

    agrees: NDArray[np.bool_]
    """[n], is the draft's top-1 the text's next token?"""
    confidence: NDArray[np.float32]
    """[n], the draft's probability of its own top-1."""

    def __post_init__(self) -> None:
        if self.agrees.shape != self.confidence.shape or self.agrees.ndim != 1:
            raise ValueError("agrees and confidence must be vectors of the same length")
        if not len(self.agrees):
            raise ValueError("an outcome needs at least one position")

    def __len__(self) -> int:
        return len(self.agrees)


class Window(Protocol):
    """A piece of text whose target KV is at hand, so that drafts of it can be scored."""

    @property
    def key(self) -> Hashable:
        """Outcomes under equal keys are of the same positions: they can be paired."""
        ...

    def score(self, subnetwork: SubNetwork) -> Outcome:
        """One parallel draft pass over the window: expensive, and it may raise."""
        ...


class Costs(Protocol):
    """What passes take on this machine; calls are expected to be cheap."""

    def draft_ms(self, subnetwork: SubNetwork) -> float:
        """One draft token."""
        ...

    def verify_ms(self, width: int) -> float:
        """A full pass of `width` tokens with all logits; width 1 is plain decoding.

        Need not be monotone.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The best way to draft with a sub-network, and what it yields."""

    value: float
    """What is maximised: `tokens_per_s` where that is more than plain decoding's, else the tokens
    gained per second added."""
    tokens_per_s: float
    speedup: float
    """Against plain decoding; below 1 speculation does not pay."""
    draft_max: int
    p_min: float
    agreement: float
    """Share of positions whose top-1 agrees: SWIFT's matchness."""
    positions: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much more one sub-network is worth than another, in tokens per second."""

    difference: float
    standard_error: float
    """Infinite where the positions are too few to tell."""
    positions: int


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Expected tokens per second under `costs`.

    draft_max: the longest draft considered, at least 1.  Plain decoding is no choice here: a search
        needs a direction even where speculation does not pay yet.
    p_min: the confidence under which drafting stops; None: the best of `P_MIN_GRID`.

    Raises:
        ValueError: draft_max is below 1.
    """

    costs: Costs
    draft_max: int = 8
    p_min: float | None = None

    def __post_init__(self) -> None:
        if self.draft_max < 1:
            raise ValueError(f"draft_max is {self.draft_max}; it must be at least 1")

    def rate(self, subnetwork: SubNetwork, outcomes: Sequence[Outcome]) -> Rate:
        """The rate over all positions of `outcomes`, at the d and p that suit them best."""
        if not outcomes:
            raise ValueError("a rate needs at least one outcome")
        p_mins = P_MIN_GRID if self.p_min is None else (self.p_min,)
        n_longest = self.draft_max + 1
        counts = np.zeros((2, len(p_mins), n_longest))  # of run lengths: accepted, confident
        for outcome in outcomes:
            agreeing, confident = self._runs(outcome, p_mins)
            lengths = (np.minimum(agreeing, confident), confident)
            for count, runs in zip(counts, lengths, strict=True):
                flat = runs + n_longest * np.arange(len(p_mins))[:, None]
                count += np.bincount(flat.ravel(), minlength=count.size).reshape(count.shape)
        positions = sum(map(len, outcomes))
        tokens = positions + np.cumsum(_at_least(counts[0]), axis=1)
        seconds = self._cost_s(subnetwork, counts[1])
        rates, gains = tokens / seconds, self._gain(tokens, seconds, positions)
        values = np.where(rates >= self._plain, rates, gains)
        p, d = np.unravel_index(np.argmax(values), values.shape)
        best = float(rates[p, d])
        return Rate(
            value=float(values[p, d]),
            tokens_per_s=best,
            speedup=best * self.costs.verify_ms(1) / 1e3,
            draft_max=int(d) + 1,
            p_min=p_mins[p],
            agreement=sum(int(outcome.agrees.sum()) for outcome in outcomes) / positions,
            positions=positions,
        )

    def compare(
        self, a: SubNetwork, b: SubNetwork, pairs: Sequence[tuple[Outcome, Outcome]]
    ) -> Comparison:
        """How much more a is worth than b, from outcomes of both on the same windows.

        The error is the delta method's: start i moves a ratio of sums, rate or gain, by
        (tokens_i - ratio cost_i) / mean cost.  Starts are dependent, by overlapping drafts and by
        the text; so the variance is that of sums over moving blocks (Bartlett's kernel on the
        ring), two longest drafts wide, or a quarter of a long window.  Clustering by window would
        need more windows than a search has.  That d and p are chosen on the same positions matters
        little: both have the same luck.
        """
        first, second = ([pair[i] for pair in pairs] for i in range(2))
        rates = self.rate(a, first), self.rate(b, second)
        moves_a, moves_b = (
            self._influences(subnetwork, outcomes, rate)
            for subnetwork, outcomes, rate in ((a, first, rates[0]), (b, second, rates[1]))
        )
        moves = [x - y for x, y in zip(moves_a, moves_b, strict=True)]
        positions = rates[0].positions
        longest = max(map(len, moves))
        width = min(max(2 * self.draft_max, longest // 4), longest)
        variance = math.inf
        if positions > width:
            # the rates were fitted to the same positions: one block's worth of freedom is gone
            total = sum(_block_variance(move, width) for move in moves)
            variance = total / positions / (positions - width)
        return Comparison(
            difference=rates[0].value - rates[1].value,
            standard_error=math.sqrt(variance),
            positions=positions,
        )

    def _runs(
        self, outcome: Outcome, p_mins: Sequence[float]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A [n] and, for each p_min, C [p_mins, n]; none above draft_max."""
        confident = (
            outcome.confidence >= np.array(p_mins, dtype=np.float32)[:, None]
        )  # as drafting does
        runs = _ring_runs(np.vstack([outcome.agrees, confident]), self.draft_max)
        return runs[0], runs[1:]

    def _cost_s(self, subnetwork: SubNetwork, confident: NDArray[Any]) -> NDArray[Any]:
        """Seconds of all drafts by p_min and d, [p_mins, draft_max], from the counts of C."""
        lengths = np.arange(self.draft_max + 1)
        draft, verify = self._pass_s(subnetwork)
        stopped = np.cumsum(confident * ((lengths + 1) * draft + verify), axis=1)[:, :-1]
        seconds: NDArray[Any] = stopped + _at_least(confident) * (lengths * draft + verify)[1:]
        return seconds

    def _influences(
        self, subnetwork: SubNetwork, outcomes: Sequence[Outcome], rate: Rate
    ) -> list[NDArray[Any]]:
        """Of each window [n]: what its starts add to the value, times the number of positions."""
        draft, verify = self._pass_s(subnetwork)
        # below plain, the token and the pass that plain decoding has too are not counted
        base = (0.0, 0.0) if rate.tokens_per_s >= self._plain else (1.0, 1.0 / self._plain)
        tokens, costs = [], []
        for outcome in outcomes:
            agreeing, (confident,) = self._runs(outcome, [rate.p_min])
            drafted = np.minimum(confident, rate.draft_max)
            tokens.append(1 - base[0] + np.minimum(agreeing, drafted))
            seconds = (drafted + (confident < rate.draft_max)) * draft + verify[drafted]
            costs.append(seconds - base[1])
        mean_cost = max(np.concatenate(costs).mean(), TINY_S)
        return [(n - rate.value * cost) / mean_cost for n, cost in zip(tokens, costs, strict=True)]

    @property
    def _plain(self) -> float:
        """Tokens per second of plain decoding."""
        return 1e3 / self.costs.verify_ms(1)

    def _gain(self, tokens: NDArray[Any], seconds: NDArray[Any], positions: int) -> NDArray[Any]:
        """Tokens gained per second added."""
        added = seconds - positions / self._plain
        return np.asarray((tokens - positions) / np.maximum(added, TINY_S))

    def _pass_s(self, subnetwork: SubNetwork) -> tuple[float, NDArray[Any]]:
        """Seconds of a draft token, and of verifying 0 .. draft_max of them."""
        verify = [self.costs.verify_ms(width) / 1e3 for width in range(1, self.draft_max + 2)]
        return self.costs.draft_ms(subnetwork) / 1e3, np.array(verify)


def _ring_runs(good: NDArray[np.bool_], longest: int) -> NDArray[np.int64]:
    """How many true positions follow from each on, itself included, on a ring: [..., n]."""
    n = good.shape[-1]
    far = 2 * n + longest
    stops = np.where(np.concatenate([good, good], axis=-1), far, np.arange(2 * n))
    next_stop = np.minimum.accumulate(stops[..., ::-1], axis=-1)[..., ::-1][..., :n]
    runs: NDArray[np.int64] = np.minimum(next_stop - np.arange(n), longest)
    return runs


def _at_least(counts: NDArray[Any]) -> NDArray[Any]:
    """How many runs are at least 1, 2, .. long, [..., longest], from counts [..., longest + 1]."""
    at_least: NDArray[Any] = np.cumsum(counts[..., :0:-1], axis=-1)[..., ::-1]
    return at_least


def _block_variance(moves: NDArray[Any], width: int) -> float:
    """Variance of the sum of a dependent series on a ring [n], from sums of blocks."""
    width = min(width, len(moves))
    sums = np.cumsum(np.concatenate([[0.0], moves, moves[: width - 1]]))
    blocks = sums[width:] - sums[:-width]
    return float(blocks @ blocks) / width
