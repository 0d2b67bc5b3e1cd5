"""llama.cpp's sampler chain, built from options.

The chain is the contract: speculative decoding samples the target with the user's own chain at
every position, in order, so its state (random numbers, penalties, grammar) moves exactly as in
plain decoding.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from swift_gguf.errors import GrammarError, SamplingError
from swift_gguf.native import library

if TYPE_CHECKING:
    from swift_gguf.model import Model


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Names and defaults are llama.cpp's (common_params_sampling)."""

    temperature: float = 0.8
    """0 and below: greedy."""
    top_k: int = 40
    """0: all tokens."""
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    """How many of the latest tokens, prompt included, penalties look at; -1: the whole context."""
    seed: int | None = None
    """None: a fresh random seed."""
    grammar: str | None = None
    """GBNF, root rule ``root``."""

    def __post_init__(self) -> None:
        numbers = (self.temperature, self.top_p, self.min_p, self.repeat_penalty)
        penalties = (self.presence_penalty, self.frequency_penalty)
        if not all(map(math.isfinite, numbers + penalties)):
            raise SamplingError("sampling options must be finite numbers")
        if self.repeat_penalty <= 0:
            raise SamplingError("the repeat penalty must be above 0; 1 switches it off")

    @property
    def has_penalties(self) -> bool:
        return (
            self.repeat_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def with_seed(self) -> SamplingOptions:
        """The same options with the seed drawn, so that a run can be repeated."""
        seed = random.getrandbits(32) if self.seed is None else self.seed
        # llama.cpp takes 0xFFFFFFFF (LLAMA_DEFAULT_SEED) for "draw one"
        return replace(self, seed=seed % 0xFFFFFFFF)


class Sampler:
    """One answer's sampler chain: grammar, penalties, top-k, top-p, min-p, temperature, draw.

    Raises:
        GrammarError: the grammar does not parse.
    """

    def __init__(
        self, model: Model, options: SamplingOptions, *, prompt: Sequence[int] = ()
    ) -> None:
        self.options = options.with_seed()
        self._api = library().api
        self._chain = self._api.llama_sampler_chain_init(
            self._api.llama_sampler_chain_default_params()
        )
        try:
            for part in self._parts(model, self.options, prompt):
                self._api.llama_sampler_chain_add(self._chain, part)
        except BaseException:
            self.close()
            raise

    def _parts(self, model: Model, options: SamplingOptions, prompt: Sequence[int]) -> list[Any]:
        api = self._api
        parts = []
        if options.grammar is not None:
            parts.append(self._grammar(model, options.grammar))
        if options.has_penalties:
            last_n = options.repeat_last_n if options.repeat_last_n >= 0 else model.n_ctx
            last_n = min(last_n, model.n_ctx)  # llama.cpp allocates as many places
            penalties = api.llama_sampler_init_penalties(
                model.n_vocab,
                last_n,
                options.repeat_penalty,
                options.frequency_penalty,
                options.presence_penalty,
            )
            for token in prompt[-last_n:] if last_n else ():
                api.llama_sampler_accept(penalties, token)
            parts.append(penalties)
        if options.temperature <= 0:
            return [*parts, api.llama_sampler_init_greedy()]
        return [
            *parts,
            api.llama_sampler_init_top_k(options.top_k),
            api.llama_sampler_init_top_p(options.top_p, 1),
            api.llama_sampler_init_min_p(options.min_p, 1),
            api.llama_sampler_init_temp(options.temperature),
            api.llama_sampler_init_dist(options.seed),
        ]

    def _grammar(self, model: Model, grammar: str) -> Any:
        with _captured_stderr() as lines:
            part = self._api.llama_sampler_init_grammar(model.vocab, grammar.encode(), b"root")
        if not part:
            detail = next((line for line in lines if line.strip()), "it does not parse")
            raise GrammarError(f"the grammar is not valid GBNF with a rule named root: {detail}")
        return part

    def sample(self, model: Model, row: int) -> int:
        """Draws a token from output row `row` of the model's last decode, and accepts it."""
        token: int = self._api.llama_sampler_sample(self._chain, model.ctx, model.output_index(row))
        return token

    def close(self) -> None:
        """Frees the chain; safe to call twice."""
        if chain := self._chain:
            self._chain = None
            self._api.llama_sampler_free(chain)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_chain", None):
            self.close()


@contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """Lines that native code writes straight to standard error inside the block.

    llama.cpp's grammar parser prints its errors instead of logging them.  The descriptor is the
    process's own, so this must stay around short calls.
    """
    lines: list[str] = []
    try:
        saved = os.dup(2)
    except OSError:  # closed: nothing can be written there anyway
        yield lines
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            lines.extend(file.read().decode("utf-8", "replace").splitlines())
