"""Measured acceptance rates of draft tokens, by source and confidence."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from swift_gguf.drafting.tree import ROOT, Offer, Tree

BANDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Lower ends of the bands of confidence; most probabilities are close to 1."""

RANKS = 4
"""The likeliest offers of a pass, counted separately by rank."""


@dataclass(frozen=True)
class Prior:
    """What is assumed of a source before any of its tokens was judged."""

    acceptance: Sequence[float]
    """[len(BANDS)], acceptance rate of each band."""
    weight: float = 2.0
    """Counts as much as this number of judged tokens."""


@dataclass
class _Band:
    accepted: float = 0.0
    judged: float = 0.0
    at: int = 0
    """When the counts were last updated, in generated tokens."""


@dataclass
class _Source:
    prior: Prior
    bands: list[_Band] = field(default_factory=lambda: [_Band() for _ in BANDS])
    others: list[_Band] = field(default_factory=lambda: [_Band() for _ in BANDS])
    """By confidence, for offers of rank 1 and above."""
    ranks: list[_Band] = field(default_factory=lambda: [_Band() for _ in range(RANKS)])
    """By rank, at any confidence."""


class Calibration:
    """Acceptance rate of the tokens that a source offers with a given confidence.

    A token is judged only if the target chose a token right after its path; all others are
    unknown (censored).  Counts decay with every generated token, whether the source drafts or not:
    texts change, and a source that was given up is tried again.
    """

    OPTIMISM = Prior((1.0,) * len(BANDS))
    """For sources without a prior: a band that is never tried would stay unknown.  A draft's
    own probability says little: a sub-network that changes nothing is always right, however
    unsure."""

    def __init__(self, priors: Mapping[str, Prior] | None = None, *, memory: float = 400.0) -> None:
        """memory: generated tokens after which a count has decayed to 1/e."""
        self._priors = dict(priors or {})
        self._fade = 1.0 - 1.0 / memory
        self._sources: dict[str, _Source] = {}
        self._now = 0

    def acceptance(self, probability: float, source: str = "", *, rank: int = 0) -> float:
        """The acceptance rate of such tokens, between 0 and 1.

        rank: see `Offer`.
        """
        known = self._source(source)
        weight = known.prior.weight
        band = bisect_right(BANDS, probability, lo=1) - 1
        if rank:
            return self._share(known.others[band], BANDS[band], weight)
        return self._share(known.bands[band], known.prior.acceptance[band], weight)

    def acceptance_of(self, offer: Offer) -> float:
        """`acceptance` of an offer."""
        return self.acceptance(offer.probability, offer.source, rank=offer.rank)

    def acceptance_by_rank(self, source: str = "") -> list[float]:
        """[RANKS], acceptance rate of a source's offers by rank, before their confidence is known.
        For ranks above 0 it is 0 until some were judged."""
        known = self._source(source)
        first = sum(known.prior.acceptance) / len(BANDS)
        priors = (first, *(0.0,) * (RANKS - 1))
        return [
            self._share(band, prior, known.prior.weight)
            for band, prior in zip(known.ranks, priors, strict=True)
        ]

    def evidence(self, source: str) -> float:
        """How many of a source's rank-0 offers were judged, with decay."""
        first = self._source(source).ranks[0]
        return first.judged * self._faded(first)

    def judge(self, offers: Sequence[Offer], token: int) -> None:
        """The target chose `token` where these were offered; each source's likeliest come first."""
        seen: set[tuple[str, int]] = set()
        for offer in offers:
            known, rank = self._source(offer.source), offer.rank
            is_right = offer.token == token
            band = bisect_right(BANDS, offer.probability, lo=1) - 1
            self._count((known.others if rank else known.bands)[band], is_right)
            if rank < RANKS and (offer.source, rank) not in seen:
                seen.add((offer.source, rank))
                self._count(known.ranks[rank], is_right)

    def observe(self, tree: Tree, accepted: Sequence[int]) -> None:
        """Judges the tokens of one verified tree."""
        for parent in (ROOT, *accepted):
            children = tree.children(parent)
            token = next((tree.tokens[child] for child in children if child in accepted), -1)
            self.judge([tree.offer(child) for child in children], token)
        self.passed(len(accepted) + 1)

    def recall(self, source: str, agrees: Iterable[bool], confidence: Iterable[float]) -> None:
        """Judges rank-0 offers of a source that were recorded earlier."""
        for is_right, probability in zip(agrees, confidence, strict=True):
            self.judge([Offer(0, float(probability), source)], 0 if is_right else -1)

    def forget(self, source: str) -> None:
        """Drops all counts of a source, for example when its sub-network changes."""
        self._sources.pop(source, None)

    def passed(self, n_tokens: int) -> None:
        """`n_tokens` were generated."""
        self._now += n_tokens

    def _source(self, name: str) -> _Source:
        if name not in self._sources:
            self._sources[name] = _Source(self._priors.get(name, self.OPTIMISM))
        return self._sources[name]

    def _faded(self, band: _Band) -> float:
        """The decay since the last update."""
        return self._fade ** (self._now - band.at)

    def _share(self, band: _Band, prior: float, weight: float) -> float:
        faded = self._faded(band)
        return (band.accepted * faded + prior * weight) / (band.judged * faded + weight)

    def _count(self, band: _Band, accepted: bool) -> None:
        faded = self._faded(band)
        band.accepted = band.accepted * faded + accepted
        band.judged = band.judged * faded + 1.0
        band.at = self._now


class Adaptive:
    """Drafts while a token is expected to save more time than it costs.

    For speculative sampling, with one source.  A token whose whole path is accepted with
    probability J saves J plain passes.  Verifying it costs `verify_share` of a plain pass, drafting
    the next one `draft_share`.
    """

    CEILING = 0.95
    """A token this likely is always drafted; otherwise a source that seems too expensive would
    never be tried again."""

    def __init__(
        self,
        calibration: Calibration,
        *,
        draft_share: Callable[[], float],
        verify_share: Callable[[], float],
    ) -> None:
        self._calibration = calibration
        self._draft_share, self._verify_share = draft_share, verify_share

    def joint(self, joint: float, offer: Offer) -> float:
        """The product of the measured acceptance rates."""
        return joint * self._calibration.acceptance_of(offer)

    def includes(self, probability: float, joint: float) -> bool:
        """Whether verifying the token saves time."""
        return joint >= min(self._verify_share(), self.CEILING)

    def extends(self, probability: float, joint: float) -> bool:
        """Whether drafting and verifying one more token after it saves time."""
        return joint >= min(self._draft_share() + self._verify_share(), self.CEILING)
