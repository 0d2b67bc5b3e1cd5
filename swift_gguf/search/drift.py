"""Notices that the text has changed: live acceptance falls below its long-run value."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Recent acceptance is an average over about this many drafted tokens.
MEMORY = 128.0
# Standard errors that recent acceptance must fall by, with a draft's tokens taken for dependent
# (what follows a rejected one is rejected).  Looked at after every draft, so well above the usual.
THRESHOLD = 4.0
DESIGN_EFFECT = 3.0


@dataclass
class DriftWatch:
    """Exponentially weighted acceptance against the average since the start."""

    accepted: float = 0.0
    drafted: float = 0.0
    recent_accepted: float = 0.0
    recent_drafted: float = 0.0

    def observe(self, accepted: int, drafted: int) -> bool:
        """Counts a draft; is acceptance significantly below what it used to be?"""
        keep = math.exp(-drafted / MEMORY)
        self.accepted += accepted
        self.drafted += drafted
        self.recent_accepted = keep * self.recent_accepted + accepted
        self.recent_drafted = keep * self.recent_drafted + drafted
        # the past without what is recent, so that a fall does not hide itself
        past = self.drafted - self.recent_drafted
        if past < MEMORY or self.recent_drafted < MEMORY / 4:
            return False
        usual = (self.accepted - self.recent_accepted) / past
        recent = self.recent_accepted / self.recent_drafted
        # an exponential average over n tokens is worth 2n; the past is uncertain, too
        worth = 1 / (2 * self.recent_drafted) + 1 / past
        spread = max(usual * (1 - usual), 0.01)
        return usual - recent > THRESHOLD * math.sqrt(DESIGN_EFFECT * spread * worth)
