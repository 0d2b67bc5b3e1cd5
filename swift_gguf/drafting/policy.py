"""Stops a draft by its own probabilities."""

from __future__ import annotations

from dataclasses import dataclass

from swift_gguf.drafting.tree import Offer


@dataclass(frozen=True)
class Threshold:
    """SWIFT's rule: continue while the draft's own probability is at least `p_min`.

    A tree also includes tokens whose path has at least the probability `joint_min`.
    """

    p_min: float
    joint_min: float = 1.0

    def joint(self, joint: float, offer: Offer) -> float:
        """The product of the draft's probabilities."""
        return joint * offer.probability

    def includes(self, probability: float, joint: float) -> bool:
        """True if the token or its path is probable enough."""
        return probability >= self.p_min or joint >= self.joint_min

    def extends(self, probability: float, joint: float) -> bool:
        """True if the token is probable enough."""
        return probability >= self.p_min
