"""The generator core: prefill, draft, verify, accept, roll back, yield.

Knows token ids and a sampler, nothing about text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from swift_gguf.drafting.source import Cycle, Drafter
from swift_gguf.drafting.tree import Tree
from swift_gguf.drafting.verification import Verdict, verify
from swift_gguf.errors import ContextFullError, UnsupportedModelError
from swift_gguf.stats import Stats
from swift_gguf.tokens import common_prefix

if TYPE_CHECKING:
    from swift_gguf.sampling.speculative import Distribution

TARGET = "target"
NO_DRAFT = Tree()


@dataclass(frozen=True)
class Token:
    """A generated token and who proposed it: a source of drafts, or ``target``."""

    id: int
    source: str


class Target(Protocol):
    """What the engine needs of a model; `swift_gguf.model.Model` is one."""

    @property
    def n_ctx(self) -> int: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def room(self) -> int: ...
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
    """Looks for better drafts while the text is generated; must leave the context as it is."""

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
) -> Iterator[Token]:
    """Yields the tokens that plain decoding would, end-of-generation tokens excluded.

    Whatever the context held is kept as far as it is a prefix of the prompt.  However the generator
    ends (end of generation, a limit, the consumer stopping, an exception), the context then holds
    exactly what plain decoding would have decoded: the prompt and every token sampled but the last
    (at an end of generation, the end is the last).

    max_tokens: None generates until the end or until the context is full; 0 does nothing.
    stats: filled while the tokens flow, `stop_reason` at the end.

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
    yielded = sampled = 0  # sampled counts an end of generation too
    cycle_s = 0.0
    path = [Token(sampler.sample(model, 0), TARGET)]  # its last token is always the target's own
    try:
        while True:
            for token in path:
                sampled += 1
                if model.is_eog(token.id):
                    stats.stop_reason = "eos"
                    return
                yielded += 1
                stats.predicted_n += 1
                yield token
                if yielded == max_tokens:
                    stats.stop_reason = "length"
                    return
            room = model.n_ctx - len(model.tokens)
            if room == 0:
                stats.stop_reason = "context"
                return
            n_max = min(draft_max, room - 1, model.room - 1)
            if max_tokens is not None:
                n_max = min(n_max, max_tokens - yielded - 1)
            if search and cycle_s:
                search_step(search, cycle_s, stats)
            start = perf_counter()
            path = _cycle(model, path[-1].id, sampler, drafter, n_max, stats)
            cycle_s = perf_counter() - start
    finally:
        _keep(model, len(prompt) + max(sampled - 1, 0))


def search_step(search: Search, cycle_s: float, stats: Stats) -> None:
    """After the tokens of the latest cycle are out, before the next begins."""
    start = perf_counter()
    search.step(cycle_s)
    seconds = perf_counter() - start
    stats.search_s += seconds
    stats.cycle_s += seconds


def _prefill(model: Target, prompt: Sequence[int], stats: Stats) -> None:
    """Decodes what the context lacks of the prompt; the last prompt token gets the logits."""
    if not prompt:
        raise ValueError("an empty prompt; give at least one token")
    if len(prompt) > model.n_ctx:
        raise ContextFullError(
            f"the prompt has {len(prompt)} tokens, the context {model.n_ctx}; "
            "use a larger --ctx-size or a shorter prompt"
        )
    start = perf_counter()
    common = min(common_prefix(model.tokens, prompt), len(prompt) - 1)
    _keep(model, common)
    common = len(model.tokens)
    model.decode(prompt[common:], n_outputs=1)
    stats.prompt_n = len(prompt) - common
    stats.prompt_s = perf_counter() - start


def _keep(model: Target, n_past: int) -> None:
    """Keeps the first `n_past` tokens, or none where the model cannot take the others back."""
    try:
        if n_past > 0:
            model.rollback(n_past)
            return
    except UnsupportedModelError:
        pass
    model.clear()


def _cycle(
    model: Target,
    pending: int,
    sampler: SamplesRows,
    drafter: Drafter | None,
    n_max: int,
    stats: Stats,
) -> list[Token]:
    """One draft and its verification: the tokens that follow `pending`, at least one.

    Afterwards the context holds `pending` and all of these but the last.
    """
    start = perf_counter()
    draft = propose(model, pending, drafter, n_max=n_max)
    tree, decoded = draft.tree, perf_counter()
    verdict = verify(
        tree, choose=lambda node: _choose(model, sampler, tree, node), is_eog=model.is_eog
    )
    stats.sample_s += perf_counter() - decoded
    conclude(model, draft, verdict, drafter, stats)
    stats.cycle_s += perf_counter() - start - draft.prompt_s
    sources = [tree.sources[node] for node in verdict.accepted]
    sources[len(verdict.tokens) - 1 :] = [TARGET]
    return [Token(*token) for token in zip(verdict.tokens, sources, strict=True)]


@dataclass(frozen=True)
class Draft:
    """A tree that was drafted and decoded: output row 0 follows the pending token, row i + 1 node
    i."""

    tree: Tree
    prompt_s: float
    """In which sources read the prompt; no part of `draft_s`."""
    draft_s: float
    verify_s: float


def propose(model: Target, pending: int, drafter: Drafter | None, *, n_max: int) -> Draft:
    """The first half of a cycle: at most `n_max` draft tokens, and the target's pass over them."""
    start = perf_counter()
    tree = drafter.draft(pending, n_max=n_max) if drafter and n_max > 0 else NO_DRAFT
    drafted = perf_counter()
    prompt_s = drafter.prompt_s if drafter and n_max > 0 else 0.0
    model.decode_tree([pending, *tree.tokens], [-1, *(parent + 1 for parent in tree.parents)])
    return Draft(
        tree,
        prompt_s=prompt_s,
        draft_s=drafted - start - prompt_s,
        verify_s=perf_counter() - drafted,
    )


def conclude(
    model: Target, draft: Draft, verdict: Verdict, drafter: Drafter | None, stats: Stats
) -> None:
    """The second half: what the target agrees with becomes text, and whoever drafted hears of it.

    drafter: None where the verdict was broken off, which tells nothing of the draft.
    """
    tree = draft.tree
    model.keep([0, *(node + 1 for node in verdict.kept)])
    if drafter:
        drafter.observe(Cycle(tree, verdict, draft_s=draft.draft_s, verify_s=draft.verify_s))
    stats.count(tree, verdict.accepted)
    stats.cycles += 1
    if not tree.tokens:
        stats.plain_cycles += 1
        stats.plain_s += draft.verify_s
    stats.cycle_n += len(verdict.tokens)
    stats.prompt_s += draft.prompt_s
    stats.draft_s += draft.draft_s
    stats.verify_s += draft.verify_s


def _choose(model: Target, sampler: SamplesRows, tree: Tree, node: int) -> int:
    """The target's next token after a node; row 0 follows the pending token."""
    proposal = tree.proposals.get(node)
    if proposal is not None and isinstance(sampler, ChoosesRows):
        children = [tree.tokens[child] for child in tree.children(node)]
        return sampler.choose(model, node + 1, children, proposal)
    return sampler.sample(model, node + 1)
