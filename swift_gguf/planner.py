"""What to do next: which sources draft, how much of it is verified, or plain decoding.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter
from typing import Protocol

from swift_gguf.drafting.passes import Passes
from swift_gguf.drafting.policy import Calibration, Prior
from swift_gguf.drafting.recycling import Recycling
from swift_gguf.drafting.source import Cycle, Lookup
from swift_gguf.drafting.tree import ROOT, Offer, Policy, Shape, Tree, grow
from swift_gguf.model import Model
from swift_gguf.verification import Verdict

MAX_NODES = 32
"""Draft tokens at most, where the user sets no limit."""

WIDTHS = (2, 3, 4, 6, 8, 12, 16, 24, MAX_NODES)
"""Where the costs of a pass are looked at."""

LAG_DISCOUNT = 4.0
"""By which tokens decoded together are cheaper than one by one."""

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

WIDE = Shape(n_nodes=0, branching=lambda top: 3)


class Prices(Protocol):
    """What passes cost at the present length of the context; `cost.CostsHere` is one."""

    def verify_ms(self, width: int) -> float:
        """A full pass with logits for every row."""
        ...

    def observe(self, width: int, ms: float) -> None:
        """A pass took so long."""
        ...


@dataclass(frozen=True)
class Drafts:
    """A source that runs passes, and what one of them costs."""

    passes: Passes
    cost_ms: Callable[[], float]


def measured_ms(model: Model) -> Callable[[], float]:
    """What a one-token pass of a model takes, found out on the spot and once."""
    if not model.tokens:
        model.decode([0])
    n_past, fastest = model.n_past, math.inf
    for _ in range(4):
        start = perf_counter()
        model.decode([0])
        model.top(0)
        fastest = min(fastest, perf_counter() - start)
        model.rollback(n_past)
    return lambda: 1e3 * fastest


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
        acceptance = self.calibration.acceptance
        return joint * acceptance(offer.probability, offer.source, rank=offer.rank)

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
        self, source: str, joint: float, covered: float, cost_ms: float, *, n_nodes: int = 0
    ) -> bool:
        """Is a pass worth its time that says what follows a node of joint probability `joint`?

        covered: the share that other offers there have already.
        n_nodes: draft tokens that will be verified anyway; the next rows' prices depend on them.
        """
        rate = self.rate
        gain = -joint * covered - rate * cost_ms
        for n, share in enumerate(self.calibration.acceptance_by_rank(source), n_nodes + 1):
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


class Planner:
    """Drafts by whatever promises most tokens a second, or not at all.

    lookups: asked at every node; they cost nothing.
    drafts: passes, run where they pay.
    forced: draft in every cycle, whether it pays or not; for those who ask for sources by name.
    fixed: how much to draft, whatever it costs; to compare with.
    shape: how many tokens may stand beside each other; a pass offers as many.
    """

    LATELY = 64
    """Cycles."""

    name = "planner"

    def __init__(
        self,
        model: Model,
        prices: Prices,
        *,
        lookups: Sequence[Lookup] = (),
        drafts: Sequence[Drafts] = (),
        calibration: Calibration | None = None,
        forced: bool = False,
        fixed: Policy | None = None,
        shape: Shape = WIDE,
    ) -> None:
        self.economy = Economy(calibration or Calibration(PRIORS), prices)
        self.guard = Guard()
        self.drafts = list(drafts)
        self._model, self._prices = model, prices
        self._lookups = list(lookups)
        self._recycling = next((each for each in lookups if isinstance(each, Recycling)), None)
        self._forced = forced or fixed is not None
        self._fixed = fixed
        self._observers: list[Callable[[Cycle], None]] = []
        self._since_draft = self.LATELY
        self._shape, self._siblings = shape, shape.branching(0.0)
        self._offered: dict[int, list[Offer]] = {}
        self._pending = 0
        self._passed = False  # for the latest draft
        self._is_new = True
        self._catching_up_s = 0.0
        self._credit_ms = 0.0  # what it may still lose
        self._priced: list[tuple[Passes, float]] = []
        self._worth = 0.1  # of what recycling offers where it knows something, in tokens
        self._reading_ms = 0.0  # to read the likeliest tokens off a row
        self._turn = 0

    ENOUGH = 64.0
    """Tokens judged, by which a source's worth is known within a twentieth or so."""

    NEW_TEXT = 200
    """Tokens that evidence fades by between two answers, which differ more than parts of one."""

    def begin(self) -> None:
        """Another answer."""
        self.economy.calibration.passed(self.NEW_TEXT)
        self.guard.begin(trusted=any(map(self._is_trusted, self.drafts)))
        self._is_new = True

    def _is_trusted(self, drafts: Drafts) -> bool:
        """Is its worth known, and more than it costs?"""
        name, economy = drafts.passes.name, self.economy
        is_known = economy.calibration.evidence(name) >= self.ENOUGH
        return is_known and economy.pays(name, 1.0, 0.0, drafts.cost_ms())

    def draft(self, pending: int, *, n_max: int) -> Tree:
        """See `Drafter.draft`."""
        self._pending = pending
        self._offered = {}
        text = [*self._model.tokens, pending]
        for lookup in self._lookups:
            lookup.follow(text)
        credit = math.inf if self._forced else self.guard.credit
        self._credit_ms = credit * self.economy.plain_ms
        n_max = self.economy.affordable(n_max, self._credit_ms)
        self._passed = False
        if n_max == 0:
            self._look_up(Tree(), ROOT)  # to learn what it would have been worth
            return Tree()
        if not self._forced:
            self.economy.look()
        self._priced = [(each.passes, each.cost_ms()) for each in self.drafts]
        self._catch_up()
        begun: list[Passes] = []
        try:
            tree = grow(
                lambda tree, node: self._expand(tree, node, begun),
                self._fixed or self.economy,
                self._shape.sized(n_max),
                is_eog=self._model.is_eog,
            )
        finally:
            self._passed = bool(begun)
            for passes in begun:
                passes.end()
        if self._fixed:
            return tree
        n = self.economy.affordable(len(tree), self._credit_ms)
        best = self.economy.best_cut(tree.joints[:n])
        return tree.cut(max(best, min(1, len(tree), self._forced)))

    def _catch_up(self) -> None:
        """Another answer: sources that may pay read the prompt, which is part of getting ready."""
        self._catching_up_s = 0.0
        if not self._is_new:
            return
        self._is_new = False
        start = perf_counter()
        for passes, cost_ms in self._priced:
            if passes.lag() and (self._forced or self.economy.pays(passes.name, 1.0, 0.0, cost_ms)):
                passes.begin(self._pending)
                passes.end()
        self._catching_up_s = perf_counter() - start

    @property
    def active(self) -> bool:
        """Were there drafts lately?"""
        return self._since_draft < self.LATELY

    @property
    def row_share(self) -> float:
        """What verifying a first draft token takes, in plain passes."""
        return self._prices.verify_ms(2) / self.economy.plain_ms - 1.0

    @property
    def why_plain(self) -> str:
        """Why there were none."""
        return (
            f"plain decoding is faster here: to verify one more token takes {self.row_share:.0%} "
            "of a pass, and no guess is likely enough"
        )

    def watch(self, observer: Callable[[Cycle], None]) -> None:
        """`observer` will hear what becomes of every draft."""
        self._observers.append(observer)

    def _look_up(self, tree: Tree, node: int) -> list[Offer]:
        path = tree.path(node)
        offers = [
            Offer(offer.token, offer.probability, lookup.name)
            for lookup in self._lookups
            for offer in lookup.offers(path)
        ]
        self._offered[node] = offers
        return offers

    def _expand(self, tree: Tree, node: int, begun: list[Passes]) -> list[Offer]:
        """What may follow a node, likeliest first: free offers, and those of passes that pay."""
        economy = self.economy
        offers = self._look_up(tree, node)
        covered = max((economy.joint(1.0, offer) for offer in offers), default=0.0)
        joint = 1.0 if node == ROOT else tree.joints[node]
        must = self._fixed is not None or (self._forced and node == ROOT)
        for passes, cost_ms in self._priced:
            n_missing = passes.missing(tree, node) if passes in begun else len(tree.path(node)) + 1
            ms = n_missing * cost_ms
            if passes not in begun:
                ms += passes.lag() * cost_ms / LAG_DISCOUNT
            n = len(tree) + 1  # with what it will offer
            within = economy.affordable(n, self._credit_ms - ms) == n
            if must or (within and economy.pays(passes.name, joint, covered, ms, n_nodes=n - 1)):
                self._credit_ms -= ms
                if passes not in begun:
                    begun.append(passes)
                    passes.begin(self._pending)
                offers += passes.offers(tree, node, self._siblings)
        return sorted(offers, key=lambda offer: -economy.joint(1.0, offer))

    def observe(self, cycle: Cycle) -> None:
        """See `Drafter.observe`."""
        tree, verdict = cycle.tree, cycle.verdict
        economy, calibration = self.economy, self.economy.calibration
        for node, token in zip((ROOT, *verdict.accepted), verdict.tokens, strict=False):
            if offers := self._offered.get(node):
                calibration.judge(offers, token)
        n_tokens, width = len(verdict.tokens), len(tree) + 1
        calibration.passed(n_tokens)
        self._prices.observe(width, 1e3 * cycle.verify_s)
        # what such a pass takes rather than what this one took: a hiccup is nobody's fault
        ms = self._prices.verify_ms(width) + 1e3 * (cycle.draft_s - self._catching_up_s)
        self._catching_up_s = 0.0
        economy.took(n_tokens, ms)
        self.guard.count(n_tokens, ms, economy.plain_ms, drafted=len(tree) > 0 or self._passed)
        self._since_draft = 0 if len(tree) else self._since_draft + 1
        if self._recycling is not None:
            self._recycle(self._recycling, verdict)
        self._offered, self._passed = {}, False  # nothing may be drafted before the next cycle
        for observer in self._observers:
            observer(cycle)

    def _recycle(self, table: Recycling, verdict: Verdict) -> None:
        """The table learns what the target said where it was asked.

        Reading the likeliest tokens off the logits takes time, too: where the table has nothing to
        give, it learns from a few cycles only.
        """
        plain_ms = self.economy.plain_ms
        offers = [each for each in self._offered.get(ROOT, ()) if each.source == table.name]
        if offers:
            best = max(self.economy.joint(1.0, offer) for offer in offers)
            self._worth += (max(0.0, best - self.row_share) - self._worth) / 32
        self._turn += 1
        if not self._forced and self._worth * plain_ms < self._reading_ms and self._turn % 8:
            return
        start = perf_counter()
        nodes = (ROOT, *verdict.kept)
        previous, *path = self._model.tokens[-len(nodes) - 1 :]
        for node, token in zip(nodes, path, strict=True):
            successors, probabilities = self._model.top(node + 1, 4)
            table.learn(token, successors, probabilities, previous=previous)
            previous = token
        self._reading_ms = 1e3 * (perf_counter() - start) / len(nodes)
