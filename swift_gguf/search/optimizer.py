"""The search for the fastest sub-network, with one expensive pass in each step.

The search on the fly, in idle time and offline use the same code.  They differ in the caller of
`step` and in the windows.  SWIFT's own search (`paper.PaperSearch`) scores a candidate once, on 32
positions, and keeps the best score.  Among many candidates, the best score belongs to the luckiest
one (the winner's curse), and it is never corrected.  Here a good candidate becomes a *challenger*.
It replaces the best sub-network so far (the *incumbent*) only if it is better on further windows,
position by position.  The window of its discovery does not count.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np

from swift_gguf.search.drift import DriftWatch
from swift_gguf.search.harm import Evidence, Scored
from swift_gguf.search.objective import Comparison, Costs, Objective, Outcome, Rate, Window
from swift_gguf.search.proposals import HarmModel, LocalMove, RandomSubset
from swift_gguf.search.space import Space
from swift_gguf.subnetwork import SubNetwork

# On synthetic models (tests/unit/search_model.py) the harm model finds the region quickly, and
# local moves improve on it where harms do not add up.  Random subsets never beat the even patterns
# there, but on a real model one in a hundred did (docs/lab/search.md): its harms add up less.
PROPOSERS = (LocalMove(), HarmModel(), RandomSubset(0.3))
SHARES = (0.4, 0.4, 0.2)
"""How often each proposer is used."""

MAX_WINDOWS = 16  # windows whose outcomes a record keeps
MAX_RECORDS = 1000
MAX_CHALLENGERS = 4
MAX_PORTFOLIO = 4
# A dropped sub-network may be proposed again until it was scored on this many windows.
SECOND_CHANCES = 3
# After MIN_POSITIONS, a challenger is promoted if it is PROMOTE_Z standard errors above the
# incumbent, and dropped if it is below.  After MAX_POSITIONS it is dropped if still undecided.
# A smaller PROMOTE_Z would follow luck.  A larger one would take too long: real candidates are
# better by a few per cent, which is also the error of two hundred positions.
MIN_POSITIONS = 96
PROMOTE_Z = 2.0
MAX_POSITIONS = 192
# A new incumbent counts as a gain if it is certainly faster by this share of the rate.
TOLERANCE = 0.005
# The weight of evidence after the text has changed, and the number of windows that are kept.
AGED = 0.25
KEPT_WINDOWS = 4


class Searcher(Protocol):
    """The interface of `Search` and `paper.PaperSearch`."""

    @property
    def best(self) -> SubNetwork: ...
    @property
    def done(self) -> bool: ...
    def step(self, window: Window) -> None:
        """Calls `window.score` once, or not at all if done.  If it fails, nothing has changed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """A sub-network's outcomes by window, and its rate on this machine."""

    subnetwork: SubNetwork
    outcomes: Mapping[Hashable, Outcome]
    rate: Rate


@dataclass
class _Record(Scored):
    """The results of a sub-network, with the outcomes of the latest windows only."""

    outcomes: dict[Hashable, Outcome] = field(default_factory=dict)
    value: float = 0.0  # the rate over the outcomes that are kept

    def add(self, key: Hashable, outcome: Outcome) -> None:
        self.outcomes[key] = outcome
        self.positions += len(outcome)
        self.agreements += float(outcome.agrees.sum())
        if len(self.outcomes) > MAX_WINDOWS:
            del self.outcomes[next(iter(self.outcomes))]

    def age(self) -> None:
        """Keeps only the latest windows, which are needed until there are new ones."""
        for key in list(self.outcomes)[:-KEPT_WINDOWS]:
            del self.outcomes[key]
        self.positions *= AGED
        self.agreements *= AGED


class Search:
    """Finds the sub-network that drafts fastest.

    known: good sub-networks, best first: the incumbent and the first challengers.  Without any, the
        search starts with the best of some even patterns.
    seen: outcomes of earlier searches.
    draft_max, p_min: see `Objective`.
    patience: the search is done after this many proposals in a row without a certain gain.

    A window should be used for several steps.  The first step scores the incumbent on it, the next
    ones score the challengers (at most 4), and only then come new proposals.  The search is
    deterministic given the seed, the windows and the outcomes.
    """

    def __init__(
        self,
        space: Space,
        costs: Costs,
        *,
        known: Sequence[SubNetwork] = (),
        seen: Mapping[SubNetwork, Mapping[Hashable, Outcome]] | None = None,
        draft_max: int = 8,
        p_min: float | None = None,
        patience: int = 200,
        seed: int = 0,
    ) -> None:
        self.space = space
        self.objective = Objective(costs=costs, draft_max=draft_max, p_min=p_min)
        self.patience = patience
        self.seed = seed
        # a profile may be from a build that could skip more sub-layers
        self._known = [subnetwork for subnetwork in known if subnetwork in space]
        self._records: dict[SubNetwork, _Record] = {}
        for subnetwork, outcomes in (seen or {}).items():
            if subnetwork in space:
                self._add(subnetwork, outcomes)
        starts = [] if self._known else _structured_starts(space)
        self._starts = [start for start in starts if start not in self._records]
        begun = sorted(self._records, key=lambda s: -self._records[s].value)
        self._incumbent = next(iter([*self._known, *begun, *self._starts]))
        # challenger -> the windows of its discovery, which do not count
        self._challengers: dict[SubNetwork, frozenset[Hashable]] = {}
        self._challenge_with(self._known)
        self._former: list[SubNetwork] = []  # incumbents on earlier texts, the latest first
        self._steps = 0
        self._fruitless = 0
        self._drift = DriftWatch()

    # -- what it found -----------------------------------------------------------------------------

    @property
    def best(self) -> SubNetwork:
        """The incumbent."""
        return self._incumbent

    @property
    def done(self) -> bool:
        """True if further steps are unlikely to find anything better.  `reopen` starts again."""
        # challengers need another window, so there is twice the time while there are any
        return self._fruitless >= self.patience * (2 if self._challengers else 1)

    @property
    def portfolio(self) -> list[SubNetwork]:
        """At most 4: the incumbent, the incumbents of earlier texts, then other known ones."""
        candidates = dict.fromkeys([self._incumbent, *self._former, *self._known])
        return list(candidates)[:MAX_PORTFOLIO]

    def knowledge(self, n: int = 8) -> list[Knowledge]:
        """The results of the portfolio and then of the best others, as far as they were scored."""
        others = sorted(self._records, key=lambda s: -self._records[s].value)
        scored = [s for s in dict.fromkeys([*self.portfolio, *others]) if self._record(s).outcomes]
        return [
            Knowledge(subnetwork=s, outcomes=dict(self._records[s].outcomes), rate=self.rate(s))
            for s in scored[:n]
        ]

    def rate(self, subnetwork: SubNetwork) -> Rate:
        """The rate of a sub-network on the latest windows where it was scored.

        Raises:
            KeyError: it was not scored.
        """
        return self.objective.rate(subnetwork, list(self._records[subnetwork].outcomes.values()))

    # -- the search --------------------------------------------------------------------------------

    def step(self, window: Window) -> None:
        """Scores one candidate on one window; see `Searcher.step`."""
        if self.done:
            return
        candidate = self._next(window.key)
        if candidate is None:  # everything in a tiny space is scored
            self._challengers.clear()
            self._fruitless = self.patience
            return
        outcome = window.score(candidate)
        self._steps += 1
        self._add(candidate, {window.key: outcome})
        self._judge(candidate)
        self._forget()

    def observe(self, accepted: int, drafted: int) -> None:
        """Counts a draft of the incumbent.  Reopens the search if the acceptance rate falls."""
        if self._drift.observe(accepted, drafted):
            self.reopen()

    def reopen(self) -> None:
        """Starts again on another text: old evidence counts less, and good sub-networks are tried
        again."""
        self._former = list(dict.fromkeys([self._incumbent, *self._former]))[:MAX_PORTFOLIO]
        for record in self._records.values():
            record.age()
        self._challenge_with(self.portfolio)
        self._fruitless = 0
        self._drift = DriftWatch()

    def _add(self, subnetwork: SubNetwork, outcomes: Mapping[Hashable, Outcome]) -> None:
        record = self._records.setdefault(subnetwork, _Record(subnetwork))
        for key, outcome in outcomes.items():
            record.add(key, outcome)
        record.value = self.rate(subnetwork).value

    def _challenge_with(self, subnetworks: Sequence[SubNetwork]) -> None:
        others = [s for s in dict.fromkeys(subnetworks) if s != self._incumbent]
        self._challengers = dict.fromkeys(others[:MAX_CHALLENGERS], frozenset())

    # -- what to score -----------------------------------------------------------------------------

    def _next(self, key: Hashable) -> SubNetwork | None:
        """The next candidate.  Nothing is changed here, because scoring may fail."""
        if self._starts:
            return self._starts[0]
        for subnetwork in (self._incumbent, *self._challengers):
            if key not in self._record(subnetwork).outcomes:
                return subnetwork
        return self._propose(key)

    def _propose(self, key: Hashable) -> SubNetwork | None:
        rng = np.random.default_rng((self.seed, self._steps))
        evidence = Evidence(
            space=self.space,
            costs=self.objective.costs,
            incumbent=self._incumbent,
            scored=list(self._records.values()),
            draft_max=self.objective.draft_max,
        )
        for number in rng.choice(len(PROPOSERS), 8, p=SHARES):
            candidate = PROPOSERS[number].propose(evidence, rng)
            if candidate is not None and self._is_worth_scoring(candidate, key):
                return candidate
        for _ in range(32):  # the proposers have nothing new
            candidate = self.space.random(rng, int(rng.integers(1, self.space.size + 1)))
            if self._is_worth_scoring(candidate, key):
                return candidate
        return None

    def _is_worth_scoring(self, candidate: SubNetwork, key: Hashable) -> bool:
        outcomes = self._record(candidate).outcomes
        return not candidate.is_whole and key not in outcomes and len(outcomes) < SECOND_CHANCES

    # -- what it means -----------------------------------------------------------------------------

    def _judge(self, candidate: SubNetwork) -> None:
        if self._starts:
            del self._starts[0]
            self._settle(candidate)
        elif candidate in self._challengers:
            self._try(candidate)
        elif candidate != self._incumbent:
            self._fruitless += 1
            self._consider(candidate)

    def _settle(self, start: SubNetwork) -> None:
        """Makes the best start the incumbent.  Starts differ by more than luck."""
        if self._records[start].value > self._records[self._incumbent].value:
            self._incumbent = start

    def _consider(self, candidate: SubNetwork) -> None:
        """Makes a candidate that looks better than the incumbent a challenger, if there is room."""
        if self._compare(candidate).difference <= 0:
            return
        seen = frozenset(self._record(candidate).outcomes)
        self._challengers[candidate] = seen
        if len(self._challengers) > MAX_CHALLENGERS:
            del self._challengers[min(self._challengers, key=self._promise)]

    def _try(self, challenger: SubNetwork) -> None:
        """Promotes a challenger, drops it, or leaves it for another window."""
        discovery = self._challengers[challenger]
        trial = self._compare(challenger, without=discovery)
        enough = trial.positions >= MIN_POSITIONS
        if enough and trial.difference > PROMOTE_Z * trial.standard_error:
            del self._challengers[challenger]
            certain = trial.difference - PROMOTE_Z * trial.standard_error
            if certain > TOLERANCE * self._records[self._incumbent].value:
                self._fruitless = 0
            self._incumbent = challenger
            self._drift = DriftWatch()
        elif (enough and trial.difference <= 0) or trial.positions >= MAX_POSITIONS:
            del self._challengers[challenger]

    def _promise(self, challenger: SubNetwork) -> float:
        comparison = self._compare(challenger)
        return comparison.difference / max(comparison.standard_error, 1e-9)

    def _compare(
        self, candidate: SubNetwork, *, without: frozenset[Hashable] = frozenset()
    ) -> Comparison:
        """Compares a candidate with the incumbent on the windows where both were scored."""
        first, second = self._record(candidate).outcomes, self._record(self._incumbent).outcomes
        pairs = [(first[key], second[key]) for key in first if key in second and key not in without]
        if not pairs:
            return Comparison(difference=0.0, standard_error=np.inf, positions=0)
        return self.objective.compare(candidate, self._incumbent, pairs)

    def _record(self, subnetwork: SubNetwork) -> _Record:
        return self._records.get(subnetwork) or _Record(subnetwork)

    def _forget(self) -> None:
        """Limits the memory: the oldest records that are not in use are dropped."""
        excess = len(self._records) - MAX_RECORDS
        if excess > 0:
            used = set(chain(self.portfolio, self._challengers))
            for subnetwork in [s for s in self._records if s not in used][:excess]:
                del self._records[subnetwork]


def _structured_starts(space: Space) -> list[SubNetwork]:
    """Even patterns that skip few to many sub-layers.  They also show the harm of each kind."""
    patterns = [(0, 4), (2, 0), (0, 2), (2, 4), (0, 3), (1, 0)]
    if space.is_narrow:
        patterns = [(0, 1), (3, 1), (0, 2), (2, 1), (6, 1)]
    starts = [space.every(attn=attn, ffn=ffn) for attn, ffn in patterns] + [space.uniform()]
    return [start for start in dict.fromkeys(starts) if not start.is_whole]
