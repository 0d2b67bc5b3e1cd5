"""Decides before each pass which sources draft and how many draft tokens are verified, if any.

`economy` computes what drafts are worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from swift_gguf.drafting.passes import Passes
from swift_gguf.drafting.recycling import Recycling
from swift_gguf.drafting.source import Cycle, Lookup
from swift_gguf.drafting.tree import ROOT, Offer, Policy, Shape, Tree, grow
from swift_gguf.drafting.verification import Verdict
from swift_gguf.model import Model
from swift_gguf.planning.calibration import Calibration
from swift_gguf.planning.economy import PRIORS, Economy, Guard, Pace, Prices

LAG_DISCOUNT = 4.0
"""How much cheaper a token is in the batch with which a source catches up with the text."""

WIDE = Shape(n_nodes=0, branching=lambda top: 3)


@dataclass(frozen=True)
class Drafts:
    """A source that runs passes, and the cost of one of them."""

    passes: Passes
    cost_ms: Callable[[], float]


class Planner:
    """Drafts from the sources that promise most tokens per second, or decodes plainly.

    lookups: asked at every node; they cost nothing.
    drafts: sources that run passes, where these save time.
    forced: draft in every cycle even if it costs time, for sources that the user names.
    fixed: a policy that ignores costs, for comparisons.
    shape: how many children a node of the draft tree may have.
    n_offers: maximum number of offers of one pass; None: as many as a node may have children.
    """

    LATELY = 64
    """Cycles without a draft after which drafts count as off."""

    HICCUP = 1.0
    """Drafting time beyond the expected time counts up to this, in plain passes.  More is caused by
    other programs: if it counted, drafts would stop for the thousands of tokens that it takes to
    earn back two seconds."""

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
        n_offers: int | None = None,
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
        self._shape = shape
        self._n_offers = shape.branching(0.0) if n_offers is None else n_offers
        self._offered: dict[int, list[Offer]] = {}
        self._pending = 0
        self._passed = False  # whether the latest draft ran passes
        self._is_new = True
        self._prompt_s = 0.0
        self._credit_ms = 0.0  # what the draft may still lose
        self._priced: list[tuple[Passes, float]] = []
        self._paces = {each.passes.name: Pace() for each in self.drafts}
        self._expected_ms: dict[str, float] = {}  # of the latest draft's passes, by source
        self._n_max = 0
        self._worth = 0.1  # tokens that an offer of recycling gains, on average
        self._reading_ms = 0.0  # time to read the likeliest tokens of a row
        self._turn = 0

    ENOUGH = 64.0
    """Judged tokens after which a source's acceptance rate is known within about .06."""

    NEW_TEXT = 200
    """Between two answers counts decay as by so many tokens: answers differ from each other."""

    def begin(self) -> None:
        """Another answer."""
        self.economy.calibration.passed(self.NEW_TEXT)
        self.guard.begin(trusted=any(map(self._is_trusted, self.drafts)))
        self._is_new = True
        self._forget_draft()

    def _forget_draft(self) -> None:
        """Clears what is remembered of the latest draft until its verdict comes."""
        self._offered, self._expected_ms = {}, {}
        self._passed, self._prompt_s = False, 0.0

    def _is_trusted(self, drafts: Drafts) -> bool:
        """Whether many of its tokens were judged, and by those it saves time."""
        name, economy = drafts.passes.name, self.economy
        is_known = economy.calibration.evidence(name) >= self.ENOUGH
        ms = self._pass_ms(drafts)
        return is_known and economy.pays(name, 1.0, 0.0, ms, n_offers=self._n_offers)

    def _pass_ms(self, drafts: Drafts) -> float:
        return drafts.cost_ms() * self._paces[drafts.passes.name].factor

    def draft(self, pending: int, *, n_max: int) -> Tree:
        """See `Drafter.draft`."""
        self._pending = pending
        self._forget_draft()
        text = [*self._model.tokens, pending]
        for lookup in self._lookups:
            lookup.follow(text)
        credit = math.inf if self._forced else self.guard.credit
        self._credit_ms = credit * self.economy.plain_ms
        n_max = self.economy.affordable(n_max, self._credit_ms)
        if not self._prices.is_known and self._fixed is None:
            n_max = 0  # the first passes of all tell what plain decoding takes
        self._n_max = n_max
        if n_max == 0:
            self._look_up(Tree(), ROOT)  # to judge the offers all the same
            return Tree()
        if not self._forced:
            self.economy.look()
        sound = (each for each in self.drafts if not each.passes.is_broken)
        self._priced = [(each.passes, self._pass_ms(each)) for each in sound]
        self._catch_up()
        begun: list[Passes] = []
        try:
            tree = grow(
                lambda tree, node: self._expand(tree, node, begun),
                self._fixed or self.economy,
                self._shape.sized(n_max, n_branches=self._model.n_branches),
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
        """In a new answer, sources that may save time process the prompt.  This counts as prompt
        processing."""
        if not self._is_new:
            return
        self._is_new = False
        start = perf_counter()
        for passes, cost_ms in self._priced:
            if not passes.lag():
                continue
            pays = self.economy.pays(passes.name, 1.0, 0.0, cost_ms, n_offers=self._n_offers)
            if self._forced or pays:
                passes.begin(self._pending)
                passes.end()
        self._prompt_s = perf_counter() - start

    @property
    def prompt_s(self) -> float:
        """See `Drafter.prompt_s`."""
        return self._prompt_s

    @property
    def active(self) -> bool:
        """Whether there was a draft in the last `LATELY` cycles."""
        return self._since_draft < self.LATELY

    @property
    def row_share(self) -> float:
        """Cost of verifying one draft token, in plain passes; at least 0."""
        return max(0.0, self._prices.verify_ms(2) / self.economy.plain_ms - 1.0)

    @property
    def why_plain(self) -> str:
        """Why there was none."""
        return (
            f"plain decoding is faster here: verifying a draft token costs {self.row_share:.0%} "
            "of a forward pass, and no draft token is likely enough"
        )

    def watch(self, observer: Callable[[Cycle], None]) -> None:
        """Calls `observer` after every cycle."""
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
        """Offers after a node, likeliest first: of lookups, and of passes that save time."""
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
            n = len(tree) + 1  # with at least one offer of this pass
            within = economy.affordable(n, self._credit_ms - ms) == n
            places = max(1, min(self._n_offers - len(offers), self._n_max - len(tree)))
            if must or (
                within
                and economy.pays(passes.name, joint, covered, ms, n_offers=places, n_nodes=n - 1)
            ):
                self._credit_ms -= ms
                self._expected_ms[passes.name] = self._expected_ms.get(passes.name, 0.0) + ms
                if passes not in begun:
                    begun.append(passes)
                    passes.begin(self._pending)
                offers += passes.offers(tree, node, self._n_offers)
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
        # the expected time rather than the measured one: the draft did not cause a hiccup
        ms = self._prices.verify_ms(width) + self._drafting_ms(cycle)
        economy.took(n_tokens, ms)
        self.guard.count(n_tokens, ms, economy.plain_ms, drafted=len(tree) > 0 or self._passed)
        self._since_draft = 0 if len(tree) else self._since_draft + 1
        if self._recycling is not None:
            self._recycle(self._recycling, verdict)
        self._forget_draft()  # the next cycle may have no draft
        for observer in self._observers:
            observer(cycle)

    def _drafting_ms(self, cycle: Cycle) -> float:
        """The time of the draft without hiccups.  Also corrects the expected cost of its passes."""
        took_ms = 1e3 * cycle.draft_s
        expected_ms = sum(self._expected_ms.values())
        for name, pace in self._paces.items():
            if name not in self._expected_ms:
                pace.rest()
            elif len(self._expected_ms) == 1:  # with several sources, each one's time is unknown
                pace.observe(took_ms, expected_ms)
        hiccup_ms = self.HICCUP * self.economy.plain_ms
        return min(took_ms, expected_ms * math.exp(Pace.NOISE) + hiccup_ms)

    def _recycle(self, table: Recycling, verdict: Verdict) -> None:
        """The table learns the target's likeliest tokens on the accepted path.

        Reading them from the logits takes time.  Where the table gains nothing, it learns from
        every eighth cycle only.
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
