"""The value of a sub-network: expected tokens per second, from teacher-forced outcomes.

SWIFT maximises *matchness*, the share of positions where the draft's top-1 is the text's token
(§4.1).  That ignores the cost of a draft pass and the end of the draft.  We maximise a rate over
the draft length d and the confidence p below which a draft stops:

    rate = sum_i tokens_i / sum_i cost_i
    tokens_i = 1 + min(A_i, drafted_i)                    drafted_i = min(C_i, d)
    cost_i = (drafted_i + [C_i < d]) draft + verify(drafted_i + 1)

A_i is the number of consecutive positions from i on where the draft agrees, and C_i the number
where it is confident.  The rate is the long-run rate of cycles that begin at any position
(renewal-reward).  A draft that stops by confidence pays for its last pass, although that token is
not drafted.  After a wrong draft token, the draft's confidence is not known; the confidence on the
true text replaces it.

Below the speed of plain decoding, the best rate belongs to a draft that costs almost nothing and is
never right, because every cycle yields one token of the target anyway.  So below plain decoding we
maximise the tokens gained for the time added to a plain pass:

    gain = sum_i (tokens_i - 1) / sum_i (cost_i - verify(1))

The rate equals that of plain decoding exactly where the gain does.  So a search that increases the
gain moves towards the point where speculation begins to pay.

A window is treated as a ring: a run that reaches the end continues at the start.  To leave out such
runs would favour short ones.  On a ring every position counts equally, and only one of n
transitions is artificial (the circular block bootstrap, Politis & Romano 1992).
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
TINY_S = 1e-9  # avoids division by 0, because a measured cost may be 0


@dataclass(frozen=True)
class Outcome:
    """A sub-network's draft tokens at n >= 1 consecutive positions of a text.

    Raises:
        ValueError: the two arrays differ in length, or are empty.
    """

    agrees: NDArray[np.bool_]
    """[n], true if the draft's top-1 is the text's next token."""
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
    """A part of a text that is in the target's KV cache, so that drafts can be scored on it."""

    @property
    def key(self) -> Hashable:
        """A key of the text and the positions.  Outcomes with equal keys can be paired."""
        ...

    def score(self, subnetwork: SubNetwork) -> Outcome:
        """Scores a sub-network in one parallel draft pass, which is expensive and may fail."""
        ...


class Costs(Protocol):
    """The costs of passes on this machine.  Calls are cheap."""

    def draft_ms(self, subnetwork: SubNetwork) -> float:
        """Milliseconds of a draft token."""
        ...

    def verify_ms(self, width: int) -> float:
        """Milliseconds of a pass of the full model with `width` tokens and all logits.

        Width 1 is plain decoding.  The costs need not increase with the width.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The best way to draft with a sub-network, and its speed."""

    value: float
    """The maximised value: `tokens_per_s` if it exceeds plain decoding, else the tokens gained per
    second added."""
    tokens_per_s: float
    speedup: float
    """The speed-up over plain decoding.  Below 1, speculation does not pay."""
    draft_max: int
    p_min: float
    agreement: float
    """The share of positions whose top-1 agrees (SWIFT's matchness)."""
    positions: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The difference in value between two sub-networks, in tokens per second."""

    difference: float
    standard_error: float
    """Infinite if there are too few positions."""
    positions: int


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Expected tokens per second under `costs`.

    draft_max: the longest draft, at least 1.  Plain decoding (0) is not a choice, because a search
        needs a direction even where speculation does not pay yet.
    p_min: the confidence below which a draft stops; None: the best of `P_MIN_GRID`.

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
        """The rate over all positions of `outcomes`, with the best d and p."""
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
        """The difference in value between a and b, from outcomes of both on the same windows.

        The error is from the delta method: start i changes a ratio of sums (rate or gain) by
        (tokens_i - ratio cost_i) / mean cost.  Starts are dependent, because drafts overlap and
        because of the text.  So the variance is that of sums over moving blocks (Bartlett's kernel
        on the ring).  A block is two longest drafts wide, or a quarter of a long window.
        Clustering by window would need more windows than a search has.  d and p are chosen on the
        same positions; that matters little, because it helps both sub-networks equally.
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
            # the rates were fitted to the same positions, which costs one block of freedom
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
        """A [n] and, for each p_min, C [p_mins, n], both limited to draft_max."""
        confident = (
            outcome.confidence >= np.array(p_mins, dtype=np.float32)[:, None]
        )  # as drafting does
        runs = _ring_runs(np.vstack([outcome.agrees, confident]), self.draft_max)
        return runs[0], runs[1:]

    def _cost_s(self, subnetwork: SubNetwork, confident: NDArray[Any]) -> NDArray[Any]:
        """Seconds of all cycles by p_min and d, [p_mins, draft_max], from the counts of C."""
        lengths = np.arange(self.draft_max + 1)
        draft, verify = self._pass_s(subnetwork)
        stopped = np.cumsum(confident * ((lengths + 1) * draft + verify), axis=1)[:, :-1]
        seconds: NDArray[Any] = stopped + _at_least(confident) * (lengths * draft + verify)[1:]
        return seconds

    def _influences(
        self, subnetwork: SubNetwork, outcomes: Sequence[Outcome], rate: Rate
    ) -> list[NDArray[Any]]:
        """For each window, [n]: the effect of its starts on the value, times the number of
        positions."""
        draft, verify = self._pass_s(subnetwork)
        # below plain decoding, the token and the pass of plain decoding are not counted
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
        """Seconds of a draft token, and of verifying 0 .. draft_max draft tokens."""
        verify = [self.costs.verify_ms(width) / 1e3 for width in range(1, self.draft_max + 2)]
        return self.costs.draft_ms(subnetwork) / 1e3, np.array(verify)


def _ring_runs(good: NDArray[np.bool_], longest: int) -> NDArray[np.int64]:
    """The number of consecutive true positions from each position on, on a ring: [..., n]."""
    n = good.shape[-1]
    far = 2 * n + longest
    stops = np.where(np.concatenate([good, good], axis=-1), far, np.arange(2 * n))
    next_stop = np.minimum.accumulate(stops[..., ::-1], axis=-1)[..., ::-1][..., :n]
    runs: NDArray[np.int64] = np.minimum(next_stop - np.arange(n), longest)
    return runs


def _at_least(counts: NDArray[Any]) -> NDArray[Any]:
    """The number of runs with length >= 1, 2, ..: [..., longest], from [..., longest + 1]."""
    at_least: NDArray[Any] = np.cumsum(counts[..., :0:-1], axis=-1)[..., ::-1]
    return at_least


def _block_variance(moves: NDArray[Any], width: int) -> float:
    """Variance of the sum of a dependent series on a ring [n], from sums of blocks."""
    width = min(width, len(moves))
    sums = np.cumsum(np.concatenate([[0.0], moves, moves[: width - 1]]))
    blocks = sums[width:] - sums[:-width]
    return float(blocks @ blocks) / width
