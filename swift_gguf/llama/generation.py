"""One answer of a `SwiftLlama`: cycles of guesses, and walks down them, one token at a time."""

from __future__ import annotations

from time import perf_counter

from swift_gguf.drafting.verification import Walk
from swift_gguf.engine import Draft, conclude, propose, search_step
from swift_gguf.model import Model
from swift_gguf.speculation import Speculation
from swift_gguf.stats import Stats


class Generation:
    """What one run of `generate` does with the model, between and beside what llama_cpp does."""

    def __init__(
        self, model: Model, speculation: Speculation, *, prompt_n: int, limit: int | None
    ) -> None:
        """limit: tokens at most, if that is known."""
        self.stats = Stats(stop_reason="stopped")
        self.started = False
        """Was a token sampled?  What is evaluated before is the prompt."""
        self._model, self._limit = model, limit
        self._drafter, self._draft_max = speculation.drafter, speculation.draft_max
        self._search = speculation.begin(prompt_n)
        self._cycle_s = 0.0
        self._draft: Draft | None = None
        self._walk: Walk | None = None

    @property
    def walking(self) -> bool:
        """Was the latest token sampled from a tree that goes on with it?"""
        return self._walk is not None

    @property
    def row(self) -> int:
        """Output row to sample the next token from: after the latest one, or its node."""
        return self._walk.node + 1 if self._walk else -1

    def prefilled(self, n: int, seconds: float) -> None:
        """Tokens were decoded as they are."""
        self.stats.prompt_n += n
        self.stats.prompt_s += seconds

    def guess(self, token: int) -> None:
        """Decodes a token, and guesses after it."""
        model, stats = self._model, self.stats
        if self._search and self._cycle_s:
            search_step(self._search, self._cycle_s, stats)
        start = perf_counter()
        n_max = min(self._draft_max, model.n_ctx - model.n_past - 1, model.room - 1)
        if self._limit is not None:
            n_max = min(n_max, self._limit - stats.predicted_n - 1)
        self._draft = propose(model, token, self._drafter, n_max=n_max)
        self._walk = Walk(self._draft.tree, is_eog=model.is_eog)
        self._cycle_s = 0.0
        self._spent(perf_counter() - start - self._draft.prompt_s)

    def sampled(self, token: int, seconds: float) -> None:
        """A token was sampled from `row`."""
        self.started = True
        if self._walk is None:
            return
        start = perf_counter()
        self._walk.take(token)
        self.stats.sample_s += seconds
        if self._walk.done:
            self.end_walk()
        self._spent(seconds + perf_counter() - start)

    def end_walk(self) -> None:
        """What was guessed right becomes text.  Where the walk was to go on, it is broken off."""
        walk, draft = self._walk, self._draft
        if walk is None or draft is None:
            return
        self._walk = self._draft = None
        drafter = self._drafter if walk.done else None
        conclude(self._model, draft, walk.verdict, drafter, self.stats)

    def put_out(self, token: int) -> None:
        """A token goes to the consumer."""
        if self._model.is_eog(token):
            self.stats.stop_reason = "eos"
            return
        self.stats.predicted_n += 1
        if self.stats.predicted_n == self._limit:
            self.stats.stop_reason = "length"

    def _spent(self, seconds: float) -> None:
        self._cycle_s += seconds
        self.stats.cycle_s += seconds
