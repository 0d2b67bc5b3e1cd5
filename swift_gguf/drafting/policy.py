"""When a draft stops by its own probability."""

from __future__ import annotations

from dataclasses import dataclass

from swift_gguf.drafting.tree import Offer


@dataclass(frozen=True)
class Threshold:
    """SWIFT's rule: go on while the draft's own probability is at least `p_min`.

    In a tree, tokens beside the likeliest one are verified if their path is at least `joint_min`
    likely.
    """

    p_min: float
    joint_min: float = 1.0

    def joint(self, joint: float, offer: Offer) -> float:
        """The product of the draft's probabilities."""
        return joint * offer.probability

    def includes(self, probability: float, joint: float) -> bool:
        """Confident, or likely enough for a tree."""
        return probability >= self.p_min or joint >= self.joint_min

    def extends(self, probability: float, joint: float) -> bool:
        """Confident."""
        return probability >= self.p_min
