"""What a draft is worth, and what it may cost.

A cycle that verifies draft tokens 1..n takes the time T.  It yields one token, and each draft
token with the probability J_i that the target accepts its whole path.  If lambda is the rate in
tokens per millisecond that can be reached without the draft, the draft is worth

    1 + sum J_i - lambda T,    T = drafting passes + the target's pass of width n + 1

(renewal-reward theorem; at the best possible lambda, the best draft is worth exactly 0).  J_i is
the product of measured acceptance rates along the path.  T comes from measured costs, which may
fall with the width; draft tokens that make the pass no slower are then verified too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from swift_gguf.drafting.tree import Offer
from swift_gguf.planning.calibration import Calibration, Prior

MAX_NODES = 32
"""Maximum number of draft tokens, unless the user sets one."""

FLOOR = 0.02
"""Less likely tokens are not considered."""

PRIORS = {
    # Counted over 1500 greedy tokens of Qwen2.5-Coder-1.5B in 13 categories.  The rates of the
    # current text are soon known: lookups are judged on every token, drafted or not.
    "ngram": Prior((0.05, 0.1, 0.1, 0.1, 0.1, 0.2, 0.5, 0.5, 0.7, 0.85, 0.93, 0.97), weight=8.0),
    "recycling": Prior(
        (0.03, 0.04, 0.05, 0.08, 0.17, 0.15, 0.25, 0.3, 0.4, 0.35, 0.35, 0.55), weight=8.0
    ),
}
"""By `BANDS`."""


class Prices(Protocol):
    """What passes cost at the current context length; see `cost.CostsHere`."""

    @property
    def is_known(self) -> bool:
        """Whether plain passes were timed."""
        ...

    def verify_ms(self, width: int) -> float:
        """A full pass of `width` tokens with logits for every row."""
        ...

    def observe(self, width: int, ms: float) -> None:
        """A pass of `width` tokens took `ms`."""
        ...


class Economy:
    """The policy that keeps draft tokens as long as they are expected to save time."""

    MEMORY = 64
    """Cycles over which the rate is averaged."""

    def __init__(self, calibration: Calibration, prices: Prices) -> None:
        self.calibration = calibration
        self._prices = prices
        self._tokens = self._ms = 0.0
        self._least = FLOOR

    @property
    def plain_ms(self) -> float:
        """Time of a token by plain decoding."""
        return self._prices.verify_ms(1)

    @property
    def rate(self) -> float:
        """Tokens per millisecond of plain decoding, or of recent cycles if that is more."""
        # averaged with some cycles of plain decoding
        tokens, ms = self._tokens + self.MEMORY / 4, self._ms + self.MEMORY / 4 * self.plain_ms
        return max(1.0 / self.plain_ms, tokens / ms)

    def took(self, n_tokens: int, ms: float) -> None:
        """A cycle of `ms` yielded `n_tokens`."""
        fade = 1.0 - 1.0 / self.MEMORY
        self._tokens = self._tokens * fade + n_tokens
        self._ms = self._ms * fade + ms

    def joint(self, joint: float, offer: Offer) -> float:
        """See `Policy`: the product of the measured acceptance rates."""
        return joint * self.calibration.acceptance_of(offer)

    def includes(self, probability: float, joint: float) -> bool:
        """See `Policy`; the final choice is made by `best_cut`."""
        return joint >= self._least

    def extends(self, probability: float, joint: float) -> bool:
        """See `Policy`."""
        return joint >= self._least

    def look(self) -> None:
        """Before every draft: sets the probability below which no token can save time."""
        least = self._row_ms(1) * self.rate
        self._least = max(FLOOR, 0.5 * least)  # unlikely tokens may fill up a pass at no extra cost

    def pays(
        self,
        source: str,
        joint: float,
        covered: float,
        cost_ms: float,
        *,
        n_offers: int,
        n_nodes: int = 0,
    ) -> bool:
        """Whether a drafting pass after a node of joint probability `joint` saves time.

        covered: acceptance rate of the best offer that is already there.
        n_offers: how many of the pass's offers could be verified.
        n_nodes: draft tokens in the tree so far; they determine the cost of the next rows.
        """
        rate = self.rate
        gain = -joint * covered - rate * cost_ms
        shares = self.calibration.acceptance_by_rank(source)[:n_offers]
        for n, share in enumerate(shares, n_nodes + 1):
            gain += joint * share - rate * self._row_ms(n)
            if gain > 0:
                return True
        return False

    def _row_ms(self, width: int) -> float:
        """What one more row adds to a pass of `width`.  Where several rows are cheaper together
        (four may take less than three), this is their average."""
        price = self._prices.verify_ms
        wider = range(width + 1, max(width, MAX_NODES) + 2)
        return max(0.0, min((price(each) - price(width)) / (each - width) for each in wider))

    def affordable(self, n_max: int, credit_ms: float) -> int:
        """How many draft tokens can be verified if, all rejected, they may lose `credit_ms`."""
        price, most_ms = self._prices.verify_ms, self.plain_ms + credit_ms
        return next((n for n in range(n_max, 0, -1) if price(n + 1) <= most_ms), 0)

    def best_cut(self, joints: Sequence[float]) -> int:
        """How many of the tokens, likeliest first, to verify."""
        rate, price = self.rate, self._prices.verify_ms
        worth = 0.0 - rate * price(1)
        best, best_n = worth, 0
        for n, tokens in enumerate(accumulate(joints), 1):
            worth = tokens - rate * price(n + 1)
            if worth > best:
                best, best_n = worth, n
        return best_n


class Guard:
    """Never slower: bounds what drafts may lose against plain decoding.

    In every answer, drafts may lose one pass, `share` of the time, and what they gained in this
    answer.  Drafts that are known to save time may lose `TRUST` passes more.  Otherwise bad luck
    would stop good drafts (gambler's ruin): drafts that gain .2 passes a cycle, with a standard
    deviation of .5, would lose one pass in every third answer.
    """

    TRUST = 3.0

    CREDIT = 8.0
    """Maximum balance in plain passes: old gains do not pay for new losses."""

    def __init__(self, *, share: float = 0.01) -> None:
        self._share = share
        self._balance = 1.0  # plain passes
        self._trust = 0.0

    def begin(self, *, trusted: bool = False) -> None:
        """Another answer, which may not lose what the last one gained.

        trusted: many draft tokens were judged, and by those the drafts save time.
        """
        self._balance = min(self._balance, 1.0)
        self._trust = self.TRUST if trusted else 0.0

    @property
    def credit(self) -> float:
        """What a draft may lose, in plain passes; negative after a larger loss."""
        return self._balance + self._trust

    def count(self, n_tokens: int, ms: float, plain_ms: float, *, drafted: bool) -> None:
        """A cycle of `ms` yielded `n_tokens`, each of which takes `plain_ms` by plain decoding."""
        passes = ms / plain_ms
        gain = n_tokens - passes if drafted else 0.0
        self._balance = min(self.CREDIT, self._balance + gain + self._share * passes)


class Pace:
    """How much longer a source's passes take than expected, as seen recently."""

    NOISE = 0.3  # a larger surprise counts as this much: it may be a hiccup; natural logarithm
    KEPT = 255 / 256  # per cycle without such a pass, so that a source is tried again

    def __init__(self) -> None:
        self._log = 0.0
        self._n = 0

    @property
    def factor(self) -> float:
        return math.exp(self._log)

    def observe(self, took_ms: float, expected_ms: float) -> None:
        """Passes took `took_ms`; those that stopped early hardly count."""
        if 0.0 < expected_ms < math.inf and took_ms > 0.0:
            surprise = math.log(took_ms / expected_ms)
            self._n += 1  # what is expected at first may be an estimate
            share = max(1 / 16, 1 / (self._n + 1))
            self._log += max(-self.NOISE, min(self.NOISE, surprise)) * share
            self._log = max(-self.NOISE, self._log)

    def rest(self) -> None:
        """A cycle without such a pass."""
        self._log *= self.KEPT
