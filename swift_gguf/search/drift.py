"""Detects that the text has changed: the acceptance rate falls below its long-run value."""

from __future__ import annotations

import math
from dataclasses import dataclass

# The recent acceptance rate is an average over about this many draft tokens.
MEMORY = 128.0
# The fall of the recent acceptance rate in standard errors.  It is high, because the test is made
# after every draft.  The design effect accounts for dependent tokens: all tokens after a rejected
# one are rejected, too.
THRESHOLD = 4.0
DESIGN_EFFECT = 3.0


@dataclass
class DriftWatch:
    """Compares an exponentially weighted acceptance rate with the average since the start."""

    accepted: float = 0.0
    drafted: float = 0.0
    recent_accepted: float = 0.0
    recent_drafted: float = 0.0

    def observe(self, accepted: int, drafted: int) -> bool:
        """Counts a draft.  True if the acceptance rate is significantly below its usual value."""
        keep = math.exp(-drafted / MEMORY)
        self.accepted += accepted
        self.drafted += drafted
        self.recent_accepted = keep * self.recent_accepted + accepted
        self.recent_drafted = keep * self.recent_drafted + drafted
        # the past without recent drafts, because a fall would lower the usual value as well
        past = self.drafted - self.recent_drafted
        if past < MEMORY or self.recent_drafted < MEMORY / 4:
            return False
        usual = (self.accepted - self.recent_accepted) / past
        recent = self.recent_accepted / self.recent_drafted
        # an exponential average over n tokens counts like 2n tokens; the past has an error, too
        worth = 1 / (2 * self.recent_drafted) + 1 / past
        spread = max(usual * (1 - usual), 0.01)
        return usual - recent > THRESHOLD * math.sqrt(DESIGN_EFFECT * spread * worth)
