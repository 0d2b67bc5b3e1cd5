"""How often draft tokens of a given confidence are accepted, and how far that makes drafts go."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from swift_gguf.drafting.tree import ROOT, Offer, Tree

BANDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Lower ends of the bands of confidence; probabilities crowd towards 1."""


RANKS = 4
"""Offers of a pass that are told apart by their order."""


@dataclass(frozen=True)
class Prior:
    """What is believed of a source before anything was seen of it."""

    acceptance: Sequence[float]
    """[len(BANDS)], of the tokens of each band."""
    weight: float = 2.0
    """As if so many tokens had been seen."""


@dataclass
class _Band:
    accepted: float = 0.0
    judged: float = 0.0
    at: int = 0
    """When the two were last brought up to date."""


@dataclass
class _Source:
    prior: Prior
    bands: list[_Band] = field(default_factory=lambda: [_Band() for _ in BANDS])
    others: list[_Band] = field(default_factory=lambda: [_Band() for _ in BANDS])
    """Of offers that are not the likeliest."""
    ranks: list[_Band] = field(default_factory=lambda: [_Band() for _ in range(RANKS)])
    """Of the likeliest offers, the second likeliest, .., whatever their confidence."""


class Calibration:
    """How often tokens that a source offers with a given confidence are accepted.

    A token counts only where the target really chose after its path: of a draft that was accepted
    to its end nothing is assumed about what it would have offered next (it is censored).  Evidence
    fades with the tokens generated, used or not: texts change, what was given up is tried again.
    """

    OPTIMISM = Prior((1.0,) * len(BANDS))
    """For drafts by passes: a band that is never tried would never be known, and a draft's own
    probability says little of it (a sub-network that differs in nothing is always right, however
    unsure)."""

    def __init__(self, priors: Mapping[str, Prior] | None = None, *, memory: float = 400.0) -> None:
        """memory: tokens after which evidence has faded to 1/e."""
        self._priors = dict(priors or {})
        self._fade = 1.0 - 1.0 / memory
        self._sources: dict[str, _Source] = {}
        self._now = 0

    def acceptance(self, probability: float, source: str = "", *, rank: int = 0) -> float:
        """The share of such tokens that are accepted, between 0 and 1.

        rank: see `Offer`; offers beside the likeliest count only where no source that was asked
            before has offered the same.
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
        """[RANKS], the same of a source's likeliest offers, the second likeliest, .., before their
        confidence is known; of others than the likeliest nothing is expected until it is seen."""
        known = self._source(source)
        first = sum(known.prior.acceptance) / len(BANDS)
        priors = (first, *(0.0,) * (RANKS - 1))
        return [
            self._share(band, prior, known.prior.weight)
            for band, prior in zip(known.ranks, priors, strict=True)
        ]

    def evidence(self, source: str) -> float:
        """How many of a source's likeliest offers were judged, as far as they still count."""
        first = self._source(source).ranks[0]
        return first.judged * self._faded(first)

    def judge(self, offers: Sequence[Offer], token: int) -> None:
        """The target chose `token` where these were offered, each source's likeliest first."""
        seen: set[tuple[str, int]] = set()
        told: set[int] = set()
        for offer in offers:
            known, rank = self._source(offer.source), offer.rank
            is_right = offer.token == token and not (rank and token in told)
            told.add(offer.token)
            band = bisect_right(BANDS, offer.probability, lo=1) - 1
            self._count((known.others if rank else known.bands)[band], is_right)
            if rank < RANKS and (offer.source, rank) not in seen:
                seen.add((offer.source, rank))
                self._count(known.ranks[rank], is_right)

    def observe(self, tree: Tree, accepted: Sequence[int]) -> None:
        """Learns from one verification what can be read off the tree alone."""
        for parent in (ROOT, *accepted):
            children = tree.children(parent)
            token = next((tree.tokens[child] for child in children if child in accepted), -1)
            self.judge([tree.offer(child) for child in children], token)
        self.passed(len(accepted) + 1)

    def recall(self, source: str, agrees: Iterable[bool], confidence: Iterable[float]) -> None:
        """What was seen of a source's likeliest offers at another time."""
        for is_right, probability in zip(agrees, confidence, strict=True):
            self.judge([Offer(0, float(probability), source)], 0 if is_right else -1)

    def forget(self, source: str) -> None:
        """It is another source from now on, by the same name."""
        self._sources.pop(source, None)

    def passed(self, n_tokens: int) -> None:
        """So many tokens were generated."""
        self._now += n_tokens

    def _source(self, name: str) -> _Source:
        if name not in self._sources:
            self._sources[name] = _Source(self._priors.get(name, self.OPTIMISM))
        return self._sources[name]

    def _faded(self, band: _Band) -> float:
        """The share of what was seen that still counts."""
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
    """Goes on while a token is expected to save more time than it takes.

    For a source that drafts by itself: a token accepted with probability J (its whole path
    included) saves J plain passes.  To verify it takes `verify_share` of one, to draft what comes
    after it `draft_share`.
    """

    CEILING = 0.95
    """A token this certain is always drafted, or there would be nothing to learn from where drafts
    look too dear."""

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
        """The product of the measured acceptances."""
        return joint * self._calibration.acceptance_of(offer)

    def includes(self, probability: float, joint: float) -> bool:
        """Its place in the verification pays."""
        return joint >= min(self._verify_share(), self.CEILING)

    def extends(self, probability: float, joint: float) -> bool:
        """The pass that drafts what comes after it, and the place of that, pay."""
        return joint >= min(self._draft_share() + self._verify_share(), self.CEILING)
