"""When a draft stops: by a fixed threshold, or by what was accepted before and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swift_gguf.drafting.tree import ROOT, Tree


@dataclass(frozen=True)
class Threshold:
    """SWIFT's rule: go on while the draft's own probability is at least `p_min`.

    In a tree, tokens beside the likeliest one are verified if their path is at least `joint_min`
    likely.
    """

    p_min: float
    joint_min: float = 1.0

    def joint(self, joint: float, probability: float) -> float:
        """The product of the draft's probabilities."""
        return joint * probability

    def includes(self, probability: float, joint: float) -> bool:
        """Confident, or likely enough for a tree."""
        return probability >= self.p_min or joint >= self.joint_min

    def extends(self, probability: float, joint: float) -> bool:
        """Confident."""
        return probability >= self.p_min


BANDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Lower ends of the bands of confidence; a draft's probabilities crowd towards 1."""


class Calibration:
    """How often tokens of a given confidence are accepted.

    Old evidence fades: texts change.  A token counts only where the target really judged it, that
    is where the whole path before it was accepted.
    """

    def __init__(self, *, prior: float = 2.0, memory: float = 400.0) -> None:
        """prior: with how many accepted tokens each band begins.  Optimism: a band that is never
        tried would never be known, and a draft's own probability says little of it (a sub-network
        that differs in nothing is always right, however unsure).
        memory: tokens after which evidence has faded to 1/e."""
        self._prior = prior
        self._fade = 1.0 - 1.0 / memory
        self._accepted = [0.0] * len(BANDS)
        self._judged = [0.0] * len(BANDS)

    def acceptance(self, probability: float) -> float:
        """The share of such tokens that are accepted, between 0 and 1."""
        band = _band(probability)
        return (self._accepted[band] + self._prior) / (self._judged[band] + self._prior)

    def observe(self, tree: Tree, accepted: Sequence[int]) -> None:
        """Learns from one verification."""
        for parent in (ROOT, *accepted):
            for child in tree.children(parent):
                self._count(tree.probabilities[child], child in accepted)

    def _count(self, probability: float, accepted: bool) -> None:
        for band in range(len(BANDS)):
            self._judged[band] *= self._fade
            self._accepted[band] *= self._fade
        band = _band(probability)
        self._judged[band] += 1.0
        self._accepted[band] += accepted


def _band(probability: float) -> int:
    return max(i for i, low in enumerate(BANDS) if probability >= low or i == 0)


class Adaptive:
    """Goes on while a token is expected to save more time than it takes.

    A token accepted with probability J (its whole path included) saves J plain passes.  Verifying
    it takes `verify_share` of a plain pass, drafting after it `draft_share` more.
    """

    CEILING = 0.95
    """A token this certain is always drafted, or there would be nothing to learn from where drafts
    look too dear."""

    def __init__(
        self, calibration: Calibration, *, draft_share: float, verify_share: float
    ) -> None:
        self._calibration = calibration
        self._verify = min(verify_share, self.CEILING)
        self._draft = min(draft_share + verify_share, self.CEILING)

    def joint(self, joint: float, probability: float) -> float:
        """The product of the measured acceptances."""
        return joint * self._calibration.acceptance(probability)

    def includes(self, probability: float, joint: float) -> bool:
        """Its place in the verification pays."""
        return joint >= self._verify

    def extends(self, probability: float, joint: float) -> bool:
        """The pass that drafts what comes after it, and the place of that, pay."""
        return joint >= self._draft
