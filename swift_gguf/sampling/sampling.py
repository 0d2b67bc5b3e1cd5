"""llama.cpp's sampler chain, built from options.

The chain is the contract: speculative decoding samples the target with the user's own chain at
every position, in order, so its state (random numbers, penalties, grammar) moves exactly as in
plain decoding (`Sampler`).  Opt-in, drafts are drawn as well and only the law of the text is the
same (`SpeculativeSampler`).
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
"""Groups in groups of a grammar."""
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
    constraint: Constraint | None = None
    """JSON by a schema (`swift_gguf.schemas`)."""

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
        return replace(self, seed=llama_seed(self.seed))


def llama_seed(seed: int | None) -> int:
    """What llama.cpp gets for a seed of any size: its lower 32 bits; None: a new one.

    0xFFFFFFFF (LLAMA_DEFAULT_SEED), which llama.cpp takes for "draw one", becomes another number.
    """
    bits = (random.getrandbits(32) if seed is None else seed) & DRAWN_SEED
    return 0x9E3779B9 if bits == DRAWN_SEED else bits


class _Chain:
    """Owns one of llama.cpp's sampler chains and the parts it is made of."""

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
        """Frees the chain; safe to call twice."""
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
    """One answer's sampler chain: grammar, penalties, top-k, top-p, min-p, temperature, draw.

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
        """Draws a token from output row `row` of the model's last decode, and accepts it.

        Raises:
            GrammarError: the grammar allows no token here.
        """
        if self.options.grammar is not None or self._matcher is not None:
            return draw(self._chain, model.logits(row), self._matcher)
        token: int = self._api.llama_sampler_sample(self._chain, model.ctx, model.output_index(row))
        return token


class Processor(_Chain):
    """A sampler's chain without its draw: the distribution the draw would be made from."""

    def __init__(self, parts: Iterable[Any], matcher: Matcher | None = None) -> None:
        super().__init__(parts)
        self._matcher = matcher

    @classmethod
    def build(
        cls, model: Model, options: SamplingOptions, *, prompt: Sequence[int] = ()
    ) -> Processor:
        """Of the chain that `Sampler(model, options, prompt=prompt)` has.

        Raises:
            GrammarError: the grammar does not parse.
        """
        return cls(_processing_parts(model, options, prompt), matcher_of(model, options))

    def distribution(self, model: Model, row: int) -> Distribution:
        """What the next token follows, given output row `row` of the model's last decode.

        All on the most likely token where the temperature is 0.  Leaves the state as it is.

        Raises:
            SamplingError: no token is left, or the logits are not finite.
        """
        logits = model.logits(row)
        if self._matcher is not None:
            self._matcher.apply(logits)
        return Distribution.softmax(*library().candidates(self._chain, logits))

    def accept(self, token: int) -> None:
        """Advances penalties and grammar by a token, which the grammar must allow here."""
        self._api.llama_sampler_accept(self._chain, token)
        if self._matcher is not None:
            self._matcher.accept(token)

    def fork(self) -> Processor:
        """A processor that goes on from the present state on its own."""
        api, chain = self._api, self._chain
        return Processor(
            (
                api.llama_sampler_clone(api.llama_sampler_chain_get(chain, i))
                for i in range(api.llama_sampler_chain_n(chain))
            ),
            self._matcher.fork() if self._matcher is not None else None,
        )


class SpeculativeSampler:
    """One answer's drafts and verdicts by the rule of `swift_gguf.speculative_sampling`.

    The same seed, model and calls give the same tokens, but not those of `Sampler`: only the law is
    the same.

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
        """Draws a token from output row `row` of the model's last decode, and accepts it."""
        return self.choose(model, row, (), None)

    def proposal(self, model: Model, row: int, path: Sequence[int]) -> Distribution:
        """What the children of a draft node are to be drawn from; leaves the state as it is.

        row: output row of the draft pass on the node.
        path: the draft tokens that lead to the node, itself included, each drawn from a proposal.
        """
        with self._processor.fork() as processor:
            for token in path:
                processor.accept(token)
            return processor.distribution(model, row)

    def draw(self, q: Distribution, k: int) -> list[int]:
        """At most k children of a draft node, distinct, from its proposal."""
        return draw_children(q, k, self._rng)

    def choose(
        self, model: Model, row: int, children: Sequence[int], q: Distribution | None
    ) -> int:
        """The target's next token at a node, accepted: one of its children or another one.

        row: output row of the target's pass on the node.
        children, q: all that were drawn for the node, in their order, and its proposal; empty and
            None if nothing was.
        """
        token = choose(self._processor.distribution(model, row), q, children, self._rng)
        self._processor.accept(token)
        return token

    def close(self) -> None:
        """Frees the chain; safe to call twice."""
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
    # at 0, llama.cpp leaves the token that its greedy sampler takes and excludes all others
    yield library().api.llama_sampler_init_temp(max(options.temperature, 0.0))


def _filters(model: Model, options: SamplingOptions, prompt: Sequence[int]) -> Iterator[Any]:
    """The parts of a chain that come before its temperature."""
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
    """What holds an answer to the constraint of its options, if there is one.

    Raises:
        GrammarError: it takes too much with the model's vocabulary.
    """
    constraint = options.constraint
    return None if constraint is None else model.vocabulary.matcher(constraint)


def draw(chain: Any, logits: Any, matcher: Matcher | None = None) -> int:
    """The token a chain with a grammar draws, and accepts, by a row of logits.

    logits: [n_vocab]; the matcher changes them.

    Raises:
        GrammarError: the grammar allows no token here; llama.cpp itself would abort.
    """
    if matcher is not None:
        matcher.apply(logits)
    token = library().draw(chain, logits)
    if token is None:
        raise GrammarError(
            "the grammar allows none of the model's tokens here; check what it says can follow"
        )
    if matcher is not None:
        matcher.accept(token)
    return token


def grammar_sampler(vocab: Any, grammar: str) -> Any:
    """llama.cpp's sampler for GBNF with a rule named root; the caller's to free.

    Raises:
        GrammarError: the grammar does not parse, or is nested deeper than llama.cpp's stack is.
    """
    _limit_depth(grammar)
    with captured_stderr() as lines:
        part = library().api.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
    if not part:
        detail = next(filter(None, map(_parsers_own, lines)), "it does not parse")
        raise GrammarError(f"the grammar is not valid GBNF with a rule named root: {detail}")
    return part


def _parsers_own(line: str) -> str:
    """What the grammar parser says in a line, empty where another thread wrote it meanwhile."""
    found = _COMPLAINT.search(line)
    return found.group().strip() if found else ""


def _limit_depth(grammar: str) -> None:
    """llama.cpp's parser recurses into groups and from rule to rule."""
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
    return penalties
