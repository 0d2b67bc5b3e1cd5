"""The one loop that generates: prompt, draft, forward pass, sampling, rollback.

It knows token ids and a sampler, nothing about text.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from swift_gguf.drafting.source import Cycle, Drafter
from swift_gguf.drafting.tree import Tree
from swift_gguf.drafting.verification import Walk
from swift_gguf.errors import ContextFullError, UnsupportedModelError
from swift_gguf.stats import Stats
from swift_gguf.tokens import common_prefix

if TYPE_CHECKING:
    from swift_gguf.sampling.speculative import Distribution

TARGET = "target"


@dataclass(frozen=True)
class Token:
    """A generated token and where it came from: a source of drafts, or ``target``."""

    id: int
    source: str


class ModelUsedError(Exception):
    """Raised by a sampler when its callbacks have used the model: the tree is gone."""


class Target(Protocol):
    """What the engine needs of a model; `swift_gguf.model.Model` is one."""

    @property
    def n_ctx(self) -> int: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def room(self) -> int: ...
    @property
    def is_fresh(self) -> bool: ...
    @property
    def rollback_refusal(self) -> str | None: ...
    def decode(self, tokens: Sequence[int], *, n_outputs: int) -> None: ...
    def decode_tree(self, tokens: Sequence[int], parents: Sequence[int]) -> None: ...
    def keep(self, path: Sequence[int]) -> None: ...
    def rollback(self, n_past: int) -> None: ...
    def clear(self) -> None: ...
    def is_eog(self, token: int) -> bool: ...


class SamplesRows(Protocol):
    """What the engine needs of a sampler; `swift_gguf.sampling.Sampler` is one."""

    def sample(self, model: Any, row: int) -> int: ...


@runtime_checkable
class ChoosesRows(SamplesRows, Protocol):
    """A sampler that judges drawn drafts; `SpeculativeSampler` is one."""

    def choose(
        self, model: Any, row: int, children: Sequence[int], q: Distribution | None
    ) -> int: ...


class Search(Protocol):
    """Looks for better drafts between cycles; leaves the context as it is."""

    def step(self, cycle_s: float) -> None:
        """Called after every cycle, with the seconds it took."""
        ...


def generate(
    model: Target,
    prompt: Sequence[int],
    *,
    sampler: SamplesRows,
    drafter: Drafter | None = None,
    search: Search | None = None,
    draft_max: int = 8,
    max_tokens: int | None = None,
    stats: Stats | None = None,
) -> Generator[Token, None, None]:
    """Yields the tokens that plain decoding would, end-of-generation tokens excluded.

    A token is sampled when the consumer asks for it, never before.  What the context holds is kept
    as far as it is a prefix of the prompt.  However the generator ends (end of generation, a limit,
    the consumer stopping, an exception), the context then holds exactly what plain decoding would
    have decoded: the prompt and every token sampled but the last (at an end of generation, the end
    is the last).

    max_tokens: None generates until the end or until the context is full; 0 does nothing.
    stats: filled while the tokens flow, `stop_reason` at the end.  The consumer's own time is in
        none of its times.

    Raises:
        ContextFullError: the prompt does not fit; nothing is decoded.
        UnsupportedModelError: a drafter, but a model that cannot take tokens back.
        DecodeError: llama.cpp failed.
    """
    stats = Stats() if stats is None else stats
    stats.stop_reason = "stopped"
    if drafter and model.rollback_refusal:
        raise UnsupportedModelError(
            f"no speculation: {model.rollback_refusal}; use --speculation off"
        )
    if max_tokens is not None and max_tokens <= 0:
        stats.stop_reason = "length"
        return
    _prefill(model, prompt, stats)
    token = Token(sampler.sample(model, -1), TARGET)
    n_sampled = 1
    cycle: _Cycle | None = None
    try:
        while True:
            if model.is_eog(token.id):
                stats.stop_reason = "eos"
                return
            stats.predicted_n += 1
            yield token
            if n_sampled == max_tokens:
                stats.stop_reason = "length"
                return
            if cycle is None or cycle.done:
                room = model.n_ctx - len(model.tokens)
                if room == 0:
                    stats.stop_reason = "context"
                    return
                n_max = min(draft_max, room - 1, model.room - 1)
                if max_tokens is not None:
                    n_max = min(n_max, max_tokens - n_sampled - 1)
                if search and cycle:
                    _search(search, cycle.seconds, stats)
                cycle = _Cycle(model, token.id, drafter, n_max, stats)
            token = cycle.sample(sampler)
            n_sampled += 1
    except ModelUsedError:
        cycle = None
        raise
    finally:
        try:
            if cycle and not cycle.done:
                cycle.end()
        finally:
            _keep(model, len(prompt) + n_sampled - 1)


def _search(search: Search, cycle_s: float, stats: Stats) -> None:
    """Runs after the last token of a cycle is out, before the next cycle begins."""
    start = perf_counter()
    search.step(cycle_s)
    seconds = perf_counter() - start
    stats.search_s += seconds
    stats.cycle_s += seconds


def _prefill(model: Target, prompt: Sequence[int], stats: Stats) -> None:
    """Decodes what the context lacks of the prompt; the last row of logits is the prompt's."""
    if not prompt:
        raise ValueError("an empty prompt; give at least one token")
    if len(prompt) > model.n_ctx:
        raise ContextFullError(
            f"the prompt has {len(prompt)} tokens, the context {model.n_ctx}; "
            "use a larger --ctx-size or a shorter prompt"
        )
    if model.is_fresh and model.tokens == list(prompt):
        return
    start = perf_counter()
    common = reuse(model, prompt)
    model.decode(prompt[common:], n_outputs=1)
    stats.prompt_n += len(prompt) - common
    stats.prompt_s += perf_counter() - start


def reuse(model: Target, prompt: Sequence[int]) -> int:
    """Keeps what the context has of the prompt, at most all but its last token; returns how much
    that is."""
    _keep(model, min(common_prefix(model.tokens, prompt), len(prompt) - 1))
    return len(model.tokens)


def _keep(model: Target, n_past: int) -> None:
    """Keeps the first `n_past` tokens, or none where the model cannot take the others back."""
    try:
        if n_past > 0:
            model.rollback(n_past)
            return
    except UnsupportedModelError:
        pass
    model.clear()


class _Cycle:
    """A draft, the forward pass over it, and the way down its tree, one token at a time."""

    def __init__(
        self, model: Target, pending: int, drafter: Drafter | None, n_max: int, stats: Stats
    ) -> None:
        """Drafts at most `n_max` tokens after `pending`, and decodes both in one pass: output row 0
        follows `pending`, row i + 1 node i."""
        self._model, self._stats = model, stats
        self._drafter = drafter
        start = perf_counter()
        tree, prompt_s = Tree(), 0.0
        if drafter and n_max > 0:
            tree = drafter.draft(pending, n_max=n_max)
            prompt_s = drafter.prompt_s
        drafted = perf_counter()
        model.decode_tree([pending, *tree.tokens], [-1, *(parent + 1 for parent in tree.parents)])
        self._draft_s = drafted - start - prompt_s
        self._verify_s = perf_counter() - drafted
        stats.prompt_s += prompt_s
        self._tree, self._walk = tree, Walk(tree, is_eog=model.is_eog)
        self.seconds = 0.0
        """What it took so far, without sources' reading the prompt and the consumer's time."""
        self._spent(self._draft_s + self._verify_s)

    @property
    def done(self) -> bool:
        """Is there nothing left to sample from?  Then the context holds what was accepted."""
        return self._walk.done

    def sample(self, sampler: SamplesRows) -> Token:
        """The next token; once there is none left to sample, the drafter hears what became of its
        draft."""
        start = perf_counter()
        token = choose(self._model, sampler, self._tree, self._walk.node)
        self._stats.sample_s += perf_counter() - start
        node = self._walk.take(token)
        if self.done:
            self.end()
        self._spent(perf_counter() - start)
        return Token(token, TARGET if node is None else self._tree.sources[node])

    def end(self) -> None:
        """The accepted tokens become text, the rest of the tree is gone.

        The drafter is told only if the walk went to its end: one that was broken off says nothing
        about the draft.
        """
        model, stats, tree, verdict = self._model, self._stats, self._tree, self._walk.verdict
        model.keep([0, *(node + 1 for node in verdict.kept)])
        if self._drafter and self.done:
            cycle = Cycle(tree, verdict, draft_s=self._draft_s, verify_s=self._verify_s)
            self._drafter.observe(cycle)
        stats.count(tree, verdict.accepted)
        stats.cycles += 1
        if not tree.tokens:
            stats.plain_cycles += 1
            stats.plain_s += self._verify_s
        stats.cycle_n += len(verdict.tokens)
        stats.draft_s += self._draft_s
        stats.verify_s += self._verify_s

    def _spent(self, seconds: float) -> None:
        self.seconds += seconds
        self._stats.cycle_s += seconds


def choose(model: Target, sampler: SamplesRows, tree: Tree, node: int) -> int:
    """The target's next token after a node of a tree that was decoded after the pending token."""
    proposal = tree.proposals.get(node)
    if proposal is not None and isinstance(sampler, ChoosesRows):
        children = [tree.tokens[child] for child in tree.children(node)]
        return sampler.choose(model, node + 1, children, proposal)
    return sampler.sample(model, node + 1)
