"""SWIFT's own search, as published (Xia et al., ICLR 2025, §4.1 and appendix), for comparison.

Its known weaknesses are kept: the start is never scored, all sub-layers have the same cost, scores
from different texts are compared, and the luckiest candidate wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swift_gguf.search.objective import Window
from swift_gguf.search.proposals import check_bayes_opt, gaussian_process
from swift_gguf.search.space import Space
from swift_gguf.subnetwork import SubNetwork


@dataclass(frozen=True, kw_only=True)
class PaperOptions:
    """The paper's hyperparameters and their defaults.

    Raises:
        ValueError: the ratio is outside (0, 1), or an interval is below 1.
    """

    skip_ratio: float = 0.45
    """r: the share of sub-layers that every candidate skips."""
    context_window: int = 32
    """The number of latest tokens in a window."""
    opt_interval: int = 1
    """The number of decoding steps for each step of the search."""
    bayes: bool = True
    bayes_interval: int = 25
    """The number of candidates for each one from the Gaussian process."""
    max_steps: int = 1000
    max_tolerance: int = 300
    """The search stops after more steps than this without a gain."""
    max_score: float = 0.95
    """The search stops above this matchness."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.skip_ratio < 1:
            raise ValueError(f"skip_ratio is {self.skip_ratio}; it must be between 0 and 1")
        if min(self.context_window, self.opt_interval, self.bayes_interval) < 1:
            raise ValueError("context_window, opt_interval and bayes_interval must be at least 1")


class PaperSearch:
    """A `Searcher` that maximises matchness, the share of positions whose top-1 agrees.

    Raises:
        SwiftError: the package for the Gaussian process is not installed.
    """

    def __init__(self, space: Space, options: PaperOptions | None = None) -> None:
        self.space = space
        self.options = options or PaperOptions()
        if self.options.bayes:
            check_bayes_opt()
        self.best = space.uniform()
        self.best_score = 0.0
        """The score of the best candidate so far.  The start is never scored."""
        self._scored: list[tuple[SubNetwork, float]] = []
        self._last_gain = 0

    @property
    def done(self) -> bool:
        options, n_steps = self.options, len(self._scored)
        return (
            self.best_score > options.max_score
            or n_steps - self._last_gain > options.max_tolerance
            or n_steps > options.max_steps
        )

    def step(self, window: Window) -> None:
        """Scores one candidate once; see `Searcher.step`."""
        if self.done:
            return
        candidate = self._propose()
        score = float(window.score(candidate).agrees.mean())
        self._scored.append((candidate, score))
        if score > self.best_score:
            self.best, self.best_score = candidate, score
            self._last_gain = len(self._scored)

    def _propose(self) -> SubNetwork:
        n_steps, options = len(self._scored), self.options
        rng = np.random.default_rng((options.seed, n_steps))
        n_skip = max(1, int(self.space.size * options.skip_ratio))
        if options.bayes and (n_steps + 1) % options.bayes_interval == 0:
            if not self._scored:
                return self.space.random(rng, n_skip)
            return gaussian_process(self.space, self._scored, n_skip, rng)
        return self.space.random(rng, n_skip)
