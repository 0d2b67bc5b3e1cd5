"""llama.cpp's sampler chain, built from options.

Speculative decoding samples the target with the user's own chain (`Sampler`), at every position and
in order.  So the chain's state (random numbers, penalties, grammar) changes exactly as in plain
decoding, and the text is the same.  With speculative sampling (`SpeculativeSampler`), which is
opt-in, the draft tokens are sampled too, and only the distribution of the text is the same.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from swift_gguf.errors import GrammarError, SamplingError
from swift_gguf.native import library
from swift_gguf.native.captured import captured_stderr
from swift_gguf.sampling.speculative import Distribution, choose, draw_children

if TYPE_CHECKING:
    from swift_gguf.model import Model
    from swift_gguf.schemas.constraint import Constraint
    from swift_gguf.schemas.matching import Matcher

MAX_NESTING = 512
"""Levels of nested groups in a grammar."""
MAX_RULES = 4096
DRAWN_SEED = 0xFFFFFFFF

_COMPLAINT = re.compile(
    r"(?<=error parsing grammar: ).+|unsupported grammar, .+|grammar does not contain .+"
)

_C = TypeVar("_C", bound="_Chain")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Names and defaults are llama.cpp's (common_params_sampling)."""

    temperature: float = 0.8
    """0 or less: greedy."""
    top_k: int = 40
    """0: all tokens."""
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    """The number of latest tokens that are penalised, prompt included; -1: the whole context."""
    seed: int | None = None
    """None: a random seed."""
    grammar: str | None = None
    """A GBNF grammar with a rule named ``root``."""
    constraint: Constraint | None = None
    """A JSON schema that the text must match (`swift_gguf.schemas`)."""

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
        """The same options with a fixed seed, so that a run can be repeated."""
        return replace(self, seed=llama_seed(self.seed))


def llama_seed(seed: int | None) -> int:
    """The seed for llama.cpp: the lower 32 bits of a seed; a random one for None.

    0xFFFFFFFF is replaced, because llama.cpp draws a random seed for it (LLAMA_DEFAULT_SEED).
    """
    bits = (random.getrandbits(32) if seed is None else seed) & DRAWN_SEED
    return 0x9E3779B9 if bits == DRAWN_SEED else bits


class _Chain:
    """Owns a sampler chain of llama.cpp and the samplers in it."""

    def __init__(self, parts: Iterable[Any]) -> None:
        self._api = library().api
        self._chain = self._api.llama_sampler_chain_init(
            self._api.llama_sampler_chain_default_params()
        )
        try:
            for part in parts:
                self._api.llama_sampler_chain_add(self._chain, part)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Frees the chain.  May be called twice."""
        if chain := self._chain:
            self._chain = None
            self._api.llama_sampler_free(chain)

    def __enter__(self: _C) -> _C:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_chain", None):
            self.close()


class Sampler(_Chain):
    """The sampler chain of an answer: grammar, penalties, top-k, top-p, min-p, temperature, draw.

    Raises:
        GrammarError: the grammar does not parse.
    """

    def __init__(
        self, model: Model, options: SamplingOptions, *, prompt: Sequence[int] = ()
    ) -> None:
        self.options = options.with_seed()
        self._matcher = matcher_of(model, self.options)
        super().__init__(_sampling_parts(model, self.options, prompt))

    def sample(self, model: Model, row: int) -> int:
        """Samples a token from output row `row` of the last batch, and accepts it.

        Raises:
            GrammarError: the grammar allows no token here.
        """
        if self.options.grammar is not None or self._matcher is not None:
            return draw(self._chain, model.logits(row), self._matcher)
        token: int = self._api.llama_sampler_sample(self._chain, model.ctx, model.output_index(row))
        return token


class Processor(_Chain):
    """A sampler chain without its last step: it gives the distribution to sample from."""

    def __init__(self, parts: Iterable[Any], matcher: Matcher | None = None) -> None:
        super().__init__(parts)
        self._matcher = matcher

    @classmethod
    def build(
        cls, model: Model, options: SamplingOptions, *, prompt: Sequence[int] = ()
    ) -> Processor:
        """The processor for the chain of `Sampler(model, options, prompt=prompt)`.

        Raises:
            GrammarError: the grammar does not parse.
        """
        return cls(_processing_parts(model, options, prompt), matcher_of(model, options))

    def distribution(self, model: Model, row: int) -> Distribution:
        """The distribution of the next token, from output row `row` of the last batch.

        At temperature 0, the most likely token has probability 1.  The state stays as it is.

        Raises:
            SamplingError: no token is left, or the logits are not finite.
        """
        logits = model.logits(row)
        if self._matcher is not None:
            self._matcher.apply(logits)
        return Distribution.softmax(*library().candidates(self._chain, logits))

    def accept(self, token: int) -> None:
        """Updates penalties and grammar with a token.  The grammar must allow it here."""
        self._api.llama_sampler_accept(self._chain, token)
        if self._matcher is not None:
            self._matcher.accept(token)

    def fork(self) -> Processor:
        """An independent copy with the current state."""
        api, chain = self._api, self._chain
        return Processor(
            (
                api.llama_sampler_clone(api.llama_sampler_chain_get(chain, i))
                for i in range(api.llama_sampler_chain_n(chain))
            ),
            self._matcher.fork() if self._matcher is not None else None,
        )


class SpeculativeSampler:
    """Samples the draft tokens of an answer and verifies them by speculative sampling.

    `sampling.speculative` has the rule.  The same seed, model and calls give the same tokens.  They
    differ from those of `Sampler`, but have the same distribution.

    Raises:
        GrammarError: the grammar does not parse.
    """

    def __init__(
        self, model: Model, options: SamplingOptions, *, prompt: Sequence[int] = ()
    ) -> None:
        self.options = options.with_seed()
        self._rng = np.random.default_rng(self.options.seed)
        self._processor = Processor.build(model, self.options, prompt=prompt)

    def sample(self, model: Model, row: int) -> int:
        """Samples a token from output row `row` of the last batch, and accepts it."""
        return self.choose(model, row, (), None)

    def proposal(self, model: Model, row: int, path: Sequence[int]) -> Distribution:
        """The distribution to sample the children of a draft node from.

        The state stays as it is.

        row: the output row of the node in the draft pass.
        path: the draft tokens from the root to the node, each sampled from a proposal.
        """
        with self._processor.fork() as processor:
            for token in path:
                processor.accept(token)
            return processor.distribution(model, row)

    def draw(self, q: Distribution, k: int) -> list[int]:
        """Samples at most k different children of a draft node from its proposal."""
        return draw_children(q, k, self._rng)

    def choose(
        self, model: Model, row: int, children: Sequence[int], q: Distribution | None
    ) -> int:
        """Samples the target's next token after a node, and accepts it.

        The token may be one of the node's children.

        row: the output row of the node in the target's forward pass.
        children: all children that were sampled for the node, in their order.
        q: the node's proposal; None if no children were sampled.
        """
        token = choose(self._processor.distribution(model, row), q, children, self._rng)
        self._processor.accept(token)
        return token

    def close(self) -> None:
        """Frees the chain.  May be called twice."""
        self._processor.close()

    def __enter__(self) -> SpeculativeSampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sampling_parts(model: Model, options: SamplingOptions, prompt: Sequence[int]) -> Iterator[Any]:
    api = library().api
    yield from _filters(model, options, prompt)
    if options.temperature <= 0:
        yield api.llama_sampler_init_greedy()
    else:
        yield api.llama_sampler_init_temp(options.temperature)
        yield api.llama_sampler_init_dist(options.seed)


def _processing_parts(
    model: Model, options: SamplingOptions, prompt: Sequence[int]
) -> Iterator[Any]:
    yield from _filters(model, options, prompt)
    # at temperature 0, llama.cpp excludes all tokens but the one that its greedy sampler takes
    yield library().api.llama_sampler_init_temp(max(options.temperature, 0.0))


def _filters(model: Model, options: SamplingOptions, prompt: Sequence[int]) -> Iterator[Any]:
    """The samplers of a chain that come before the temperature."""
    api = library().api
    if options.grammar is not None:
        yield grammar_sampler(model.vocab, options.grammar)
    if options.has_penalties:
        yield _penalties(model, options, prompt)
    if options.temperature > 0:
        yield api.llama_sampler_init_top_k(options.top_k)
        yield api.llama_sampler_init_top_p(options.top_p, 1)
        yield api.llama_sampler_init_min_p(options.min_p, 1)


def matcher_of(model: Model, options: SamplingOptions) -> Matcher | None:
    """A matcher for the constraint in the options, if there is one.

    Raises:
        GrammarError: the constraint is too large with the model's vocabulary.
    """
    constraint = options.constraint
    return None if constraint is None else model.vocabulary.matcher(constraint)


def draw(chain: Any, logits: Any, matcher: Matcher | None = None) -> int:
    """Samples a token from a row of logits with a chain that has a grammar, and accepts it.

    logits: [n_vocab]; the matcher changes them.

    Raises:
        GrammarError: the grammar allows no token here.  llama.cpp itself would abort.
    """
    if matcher is not None:
        matcher.apply(logits)
    token = library().draw(chain, logits)
    if token is None:
        raise GrammarError(
            "the grammar allows none of the model's tokens here; check the rule that applies here"
        )
    if matcher is not None:
        matcher.accept(token)
    return token


def grammar_sampler(vocab: Any, grammar: str) -> Any:
    """llama.cpp's sampler for a GBNF grammar with a rule named root.  The caller frees it.

    Raises:
        GrammarError: the grammar does not parse, or is nested too deep for llama.cpp's stack.
    """
    _limit_depth(grammar)
    with captured_stderr() as lines:
        part = library().api.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
    if not part:
        detail = next(filter(None, map(_parsers_own, lines)), "it does not parse")
        raise GrammarError(f"the grammar is not valid GBNF with a rule named root: {detail}")
    return part


def _parsers_own(line: str) -> str:
    """The grammar parser's message in a line; empty if another thread wrote the line."""
    found = _COMPLAINT.search(line)
    return found.group().strip() if found else ""


def _limit_depth(grammar: str) -> None:
    """Refuses deep grammars, because llama.cpp's parser recurses into groups and rules."""
    depth = deepest = 0
    for character in grammar:  # brackets in literals count, too
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING or grammar.count("::=") > MAX_RULES:
        raise GrammarError(
            f"the grammar is nested deeper than {MAX_NESTING} or has more than {MAX_RULES} rules; "
            "make it smaller"
        )


def _penalties(model: Model, options: SamplingOptions, prompt: Sequence[int]) -> Any:
    api = library().api
    last_n = options.repeat_last_n if options.repeat_last_n >= 0 else model.n_ctx
    last_n = min(last_n, model.n_ctx)  # llama.cpp allocates memory for them
    penalties = api.llama_sampler_init_penalties(
        model.n_vocab,
        last_n,
        options.repeat_penalty,
        options.frequency_penalty,
        options.presence_penalty,
    )
    for token in prompt[-last_n:] if last_n else ():
        api.llama_sampler_accept(penalties, token)
    return penalties
