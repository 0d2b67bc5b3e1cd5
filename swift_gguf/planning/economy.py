"""What a draft is worth, and what it may cost.

Everything is counted in time.  A cycle that verifies the draft tokens 1..n takes T and yields one
token and, of each draft token, the share J_i that the target will accept its whole path.  With
lambda tokens a millisecond to be had otherwise, a draft is worth

    1 + sum J_i - lambda T,    T = passes of the drafters + the target's pass of width n + 1

(renewal-reward; at the best attainable lambda the best draft is worth exactly 0).  J_i is the
product of measured acceptances along the path, T comes from measured costs, which need not be
monotone: further guesses that make a pass no dearer are verified, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from swift_gguf.drafting.tree import Offer
from swift_gguf.planning.calibration import Calibration, Prior

MAX_NODES = 32
"""Draft tokens at most, where the user sets no limit."""

WIDTHS = (2, 3, 4, 6, 8, 12, 16, 24, MAX_NODES)
"""Where the costs of a pass are looked at."""

FLOOR = 0.02
"""Less likely tokens are not looked at."""

PRIORS = {
    # As counted over 1500 greedy tokens of Qwen2.5-Coder-1.5B, of 13 kinds of tasks.  What holds
    # for the text at hand is soon known: every token that is generated tells, drafted or not.
    "ngram": Prior((0.05, 0.1, 0.1, 0.1, 0.1, 0.2, 0.5, 0.5, 0.7, 0.85, 0.93, 0.97), weight=8.0),
    "recycling": Prior(
        (0.03, 0.04, 0.05, 0.08, 0.17, 0.15, 0.25, 0.3, 0.4, 0.35, 0.35, 0.55), weight=8.0
    ),
}
"""By `BANDS`."""


class Prices(Protocol):
    """What passes cost at the present length of the context; `cost.CostsHere` is one."""

    def verify_ms(self, width: int) -> float:
        """A full pass with logits for every row."""
        ...

    def observe(self, width: int, ms: float) -> None:
        """A pass took so long."""
        ...


class Economy:
    """A policy that draws a line where a draft's tokens cost more than they promise."""

    MEMORY = 64
    """Cycles over which the rate is averaged."""

    def __init__(self, calibration: Calibration, prices: Prices) -> None:
        self.calibration = calibration
        self._prices = prices
        self._tokens = self._ms = 0.0
        self._least = FLOOR

    @property
    def plain_ms(self) -> float:
        """A token by plain decoding."""
        return self._prices.verify_ms(1)

    @property
    def rate(self) -> float:
        """Tokens a millisecond to be had otherwise: plainly, or as was reached lately."""
        # as if there had been as many cycles of plain decoding before the first
        tokens, ms = self._tokens + self.MEMORY / 4, self._ms + self.MEMORY / 4 * self.plain_ms
        return max(1.0 / self.plain_ms, tokens / ms)

    def took(self, n_tokens: int, ms: float) -> None:
        """A cycle yielded `n_tokens`."""
        fade = 1.0 - 1.0 / self.MEMORY
        self._tokens = self._tokens * fade + n_tokens
        self._ms = self._ms * fade + ms

    def joint(self, joint: float, offer: Offer) -> float:
        """See `Policy`: the product of the measured acceptances."""
        return joint * self.calibration.acceptance_of(offer)

    def includes(self, probability: float, joint: float) -> bool:
        """See `Policy`; what is worth its place is decided at the end, by `best_cut`."""
        return joint >= self._least

    def extends(self, probability: float, joint: float) -> bool:
        """See `Policy`."""
        return joint >= self._least

    def look(self) -> None:
        """Before every draft: draws the line under which no token can pay for its place."""
        # Tokens come likeliest first: unless so many alike pay together, none of them does.
        least = self._row_ms(1) * self.rate
        self._least = max(FLOOR, 0.5 * least)  # some less likely ones fill a pass that is paid for

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
        """Is a pass worth its time that says what follows a node of joint probability `joint`?

        covered: the share that other offers there have already.
        n_offers: places there are for what it says.
        n_nodes: draft tokens that will be verified anyway; the next rows' prices depend on them.
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
        """What a further row adds to a pass of `width`: as one of several, where those are cheaper
        together (four rows may take less than three), for there may be more to come."""
        price = self._prices.verify_ms
        wider = {width + 1, *(each for each in WIDTHS if each > width)}
        return max(0.0, min((price(each) - price(width)) / (each - width) for each in wider))

    def affordable(self, n_max: int, credit_ms: float) -> int:
        """Draft tokens at most whose verification loses no more than that, if all are wrong."""
        price, most_ms = self._prices.verify_ms, self.plain_ms + credit_ms
        return next((n for n in range(n_max, 0, -1) if price(n + 1) <= most_ms), 0)

    def best_cut(self, joints: Sequence[float]) -> int:
        """How many of the tokens, likeliest first, are verified."""
        rate, price = self.rate, self._prices.verify_ms
        worth = 0.0 - rate * price(1)
        best, best_n = worth, 0
        for n, tokens in enumerate(accumulate(joints), 1):
            worth = tokens - rate * price(n + 1)
            if worth > best:
                best, best_n = worth, n
        return best_n


class Guard:
    """Never slower: losses against plain decoding stay within a share of the time.

    In every answer drafts may lose what they gained lately, `share` of the time, and one pass.
    Where many outcomes say that they pay, they may be unlucky for `TRUST` passes more: drafts that
    gain a fifth of a pass a cycle, give or take half a pass, would lose their only one in every
    third answer (gambler's ruin), and with it what they would have gained.
    """

    TRUST = 3.0

    CREDIT = 8.0
    """Plain passes that gains are remembered for at most: old ones do not pay for new losses."""

    def __init__(self, *, share: float = 0.01) -> None:
        self._share = share
        self._balance = 1.0  # plain passes
        self._trust = 0.0

    def begin(self, *, trusted: bool = False) -> None:
        """Another answer: what the last one gained is not this one's to lose.

        trusted: much was seen of the drafts, and by that they pay.
        """
        self._balance = min(self._balance, 1.0)
        self._trust = self.TRUST if trusted else 0.0

    @property
    def credit(self) -> float:
        """What a draft may lose, in plain passes; negative after one that lost more."""
        return self._balance + self._trust

    def count(self, n_tokens: int, ms: float, plain_ms: float, *, drafted: bool) -> None:
        """A cycle of `ms` yielded `n_tokens`, each of which takes `plain_ms` otherwise."""
        passes = ms / plain_ms
        gain = n_tokens - passes if drafted else 0.0
        self._balance = min(self.CREDIT, self._balance + gain + self._share * passes)


class Pace:
    """How much longer a source's passes take than they are priced, as seen lately."""

    NOISE = 0.3  # what may be so for no reason; a logarithm
    KEPT = 255 / 256  # for each cycle without such a pass: who never looks errs

    def __init__(self) -> None:
        self._log = 0.0

    @property
    def factor(self) -> float:
        return math.exp(self._log)

    def observe(self, took_ms: float, expected_ms: float) -> None:
        """Passes took so long; a hiccup counts little, and passes that gave up next to nothing."""
        if 0.0 < expected_ms < math.inf and took_ms > 0.0:
            surprise = math.log(took_ms / expected_ms)
            self._log += max(-self.NOISE, min(self.NOISE, surprise)) / 16
            self._log = max(-self.NOISE, self._log)

    def rest(self) -> None:
        """A cycle without such a pass."""
        self._log *= self.KEPT
