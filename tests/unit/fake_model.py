"""A target, samplers and a drafter without weights: a slip of the engine changes the text."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from swift_gguf.drafting.source import Cycle
from swift_gguf.drafting.tree import Offer, Tree
from swift_gguf.errors import DecodeError, UnsupportedModelError

_MASK = (1 << 64) - 1
_ENOUGH = 1000  # decodes; a broken engine must fail, not hang


class ContractViolationError(AssertionError):
    """The engine asked for something a real model would refuse or answer with garbage."""


class DrafterError(Exception):
    """What a scripted drafter raises when told to fail."""


class SamplerError(Exception):
    """What a fake sampler raises when told to fail."""


def mix(state: int, value: int) -> int:
    """A cheap hash of a pair; the state before and the value both matter."""
    state = ((state ^ (value + 1)) * 0x5851F42D4C957F2D + 0x14057B7EF767814F) & _MASK
    return state ^ (state >> 29)


class State(NamedTuple):
    """What a target knows after some tokens: how many they were, and a hash of all of them."""

    length: int = 0
    digest: int = 0

    def after(self, token: int) -> State:
        return State(self.length + 1, mix(self.digest, token))


class FakeModel:
    """A target whose next token depends on every token of its context.

    A token lost, doubled or left behind by a rollback changes everything that follows.  The states
    are kept apart from `tokens`, as a KV cache is, one for each position.

    n_eog: ids below end a generation.
    eog_at: context lengths after which the target ends the generation, whatever the sampler.
    fail_at: number of the decode (the first is 1) that fails as llama.cpp may; nothing is decoded.
    """

    def __init__(
        self,
        *,
        n_vocab: int = 32,
        n_eog: int = 2,
        n_ctx: int = 64,
        eog_at: Sequence[int] = (),
        rollback_refusal: str | None = None,
        fail_at: int | None = None,
    ) -> None:
        if n_vocab - n_eog < 2:
            raise ValueError("a wrong token needs a second one that does not end the generation")
        self.n_vocab = n_vocab
        self.n_eog = n_eog
        self.n_ctx = n_ctx
        self.eog_at = frozenset(eog_at)
        self.rollback_refusal = rollback_refusal
        self.fail_at = fail_at
        self.tokens: list[int] = []
        self.n_decodes = 0
        self.n_clears = 0
        self.decodes: list[tuple[int, int]] = []
        """Of each decode that succeeded: tokens, outputs."""
        self._states = [State()]
        self._nodes: list[tuple[int, int, State]] = []  # the tree: token, parent, state
        self._outputs: list[State] = []

    # -- what the engine needs ---------------------------------------------------------------------

    n_branches = 44

    @property
    def room(self) -> int:
        return self.n_ctx - len(self.tokens) - len(self._nodes)

    @property
    def is_fresh(self) -> bool:
        return self._outputs[-1:] == [self.state]

    def decode(self, tokens: Sequence[int], *, n_outputs: int = 1) -> None:
        self._check(tokens)
        if not 1 <= n_outputs <= len(tokens):
            raise ContractViolationError(f"{n_outputs} outputs of {len(tokens)} tokens")
        if self._nodes:
            raise ContractViolationError("a tree is in the way")
        self._count(tokens, n_outputs)
        for token in tokens:
            self._states.append(self.state.after(token))
        self.tokens.extend(tokens)
        self._outputs = self._states[-n_outputs:]

    def decode_tree(self, tokens: Sequence[int], parents: Sequence[int]) -> None:
        self._check(tokens)
        self._count(tokens, len(tokens))
        first = len(self._nodes)
        for token, parent in zip(tokens, parents, strict=True):
            if not -1 <= parent < len(self._nodes):
                raise ContractViolationError(f"node {parent} is not there yet")
            before = self._nodes[parent][2] if parent >= 0 else self.state
            self._nodes.append((token, parent, before.after(token)))
        self._outputs = [state for _, _, state in self._nodes[first:]]

    def keep(self, path: Sequence[int]) -> None:
        parent = -1
        for node in path:
            token, expected, state = self._nodes[node]
            if parent != expected:
                raise ContractViolationError(f"{path} is no path of the tree")
            self.tokens.append(token)
            self._states.append(state)
            parent = node
        self._nodes.clear()

    def _check(self, tokens: Sequence[int]) -> None:
        if len(self.tokens) != self.state.length:
            raise ContractViolationError("somebody changed `tokens`")
        if len(tokens) > self.room:
            raise ContractViolationError(
                f"{len(self.tokens)} + {len(tokens)} tokens > {self.n_ctx}"
            )
        if not tokens or not all(0 <= token < self.n_vocab for token in tokens):
            raise ContractViolationError(f"{tokens} are not all in the vocabulary")

    def _count(self, tokens: Sequence[int], n_outputs: int) -> None:
        self.n_decodes += 1
        if self.n_decodes > _ENOUGH:
            raise ContractViolationError("the generation does not get on")
        if self.n_decodes == self.fail_at:
            raise DecodeError("a failure made for a test")
        self.decodes.append((len(tokens), n_outputs))

    def rollback(self, n_past: int) -> None:
        if n_past < 0:
            raise ContractViolationError(f"a rollback to position {n_past}")
        if self._nodes and self.rollback_refusal:
            raise UnsupportedModelError(self.rollback_refusal)
        self._nodes.clear()
        if n_past >= len(self.tokens):
            return
        if self.rollback_refusal:
            raise UnsupportedModelError(self.rollback_refusal)
        del self.tokens[n_past:]
        del self._states[n_past + 1 :]

    def clear(self) -> None:
        self.n_clears += 1
        self.tokens.clear()
        self._nodes.clear()
        del self._states[1:]

    def is_eog(self, token: int) -> bool:
        return token < self.n_eog

    # -- what samplers and drafters need -----------------------------------------------------------

    @property
    def state(self) -> State:
        return self._states[-1]

    def output(self, row: int) -> State:
        """The state a row of logits comes from; it must still be in the context."""
        if not -1 <= row < len(self._outputs) or not self._outputs:
            raise ContractViolationError(f"row {row} has no logits")
        state = self._outputs[row]
        if state not in [node[2] for node in self._nodes] and (
            state.length >= len(self._states) or self._states[state.length] != state
        ):
            raise ContractViolationError(f"row {row} was rolled back")
        return state

    def spoil_outputs(self) -> None:
        """A draft pass in the target's own context overwrites its logits."""
        self._outputs = []

    def choose(self, state: State, salt: int = 0) -> int:
        """The next token; `salt` stands for a sampler's luck."""
        value = mix(state.digest, salt)
        if state.length in self.eog_at:
            return value % self.n_eog
        return self.n_eog + value % (self.n_vocab - self.n_eog)


class GreedySampler:
    """Always the target's first choice.

    fail_at: number of the call (the first is 1) that raises.
    """

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.calls: list[tuple[State, int]] = []
        """What each call saw and drew."""

    def sample(self, model: FakeModel, row: int) -> int:
        state = model.output(row)
        if len(self.calls) + 1 == self.fail_at:
            raise SamplerError
        token = self.peek(model, state, 0)
        self.calls.append((state, token))
        return token

    def peek(self, model: FakeModel, state: State, ahead: int) -> int:
        """What the call after `ahead` more will draw if it sees `state`; changes nothing."""
        return model.choose(state)


class SeededSampler(GreedySampler):
    """Draws by its seed and by how often it was asked, as a random number generator does."""

    def __init__(self, seed: int, *, fail_at: int | None = None) -> None:
        super().__init__(fail_at=fail_at)
        self.seed = seed

    def peek(self, model: FakeModel, state: State, ahead: int) -> int:
        return model.choose(state, mix(self.seed, len(self.calls) + ahead))


@dataclass(frozen=True)
class DraftCall:
    """What a drafter was asked, and its answer."""

    context: list[int]
    pending: int
    n_max: int
    tokens: list[int]


class ScriptedDrafter:
    """Drafts by a script, one string a cycle (again from the first after the last).

    Its letters: `r` the token the sampler will draw there, `w` another one, `e` an end of
    generation (right where the target ends).  What comes after a wrong token follows from that
    wrong past.

    fail_at: number of the call (the first is 1) that raises, leaving two tokens in the context.
    """

    name = "scripted"
    prompt_s = 0.0

    def __init__(
        self,
        model: FakeModel,
        sampler: GreedySampler,
        script: Sequence[str],
        *,
        fail_at: int | None = None,
    ) -> None:
        self.calls: list[DraftCall] = []
        self.accepted: list[int] = []
        self.fail_at = fail_at
        self._model = model
        self._sampler = sampler
        self._script = script

    def draft(self, pending: int, *, n_max: int) -> Tree:
        assert n_max >= 1, "nothing to draft, yet asked"
        model = self._model
        context = list(model.tokens)
        if len(self.calls) + 1 == self.fail_at:
            model.decode([pending, pending], n_outputs=1)
            raise DrafterError
        tokens: list[int] = []
        state = model.state.after(pending)
        for letter in self._script[len(self.calls) % len(self._script)][:n_max]:
            right = self._sampler.peek(model, state, len(tokens))
            tokens.append({"r": self._right, "w": self._wrong, "e": self._end}[letter](right))
            state = state.after(tokens[-1])
        model.spoil_outputs()
        self.calls.append(DraftCall(context, pending, n_max, tokens))
        assert model.tokens == context
        return replace(Tree.chain(tokens), sources=[self.name] * len(tokens))

    def observe(self, cycle: Cycle) -> None:
        if len(cycle.tree):
            assert self.calls[-1].tokens == cycle.tree.tokens
        self.accepted.append(len(cycle.verdict.accepted))

    def _right(self, right: int) -> int:
        return right

    def _wrong(self, right: int) -> int:
        first, last = self._model.n_eog, self._model.n_vocab - 1
        return right + 1 if first <= right < last else first

    def _end(self, right: int) -> int:
        return right if self._model.is_eog(right) else 0


class TreeDrafter:
    """Always drafts the tree of the given shape, right as far as one of its nodes.

    parents: the shape, as in `Tree`.
    right: the last node of the path that the target will choose; -1: all nodes are wrong.
    """

    name = "tree"
    prompt_s = 0.0

    def __init__(
        self, model: FakeModel, sampler: GreedySampler, parents: Sequence[int], right: int
    ) -> None:
        self._model, self._sampler = model, sampler
        self._parents = list(parents)
        self._right = set()
        while right >= 0:
            self._right.add(right)
            right = self._parents[right]
        self.accepted: list[int] = []

    def draft(self, pending: int, *, n_max: int) -> Tree:
        root = self._model.state.after(pending)
        tree, states = Tree(), list[State]()
        for node, parent in enumerate(self._parents[:n_max]):
            state = states[parent] if parent >= 0 else root
            right = self._sampler.peek(self._model, state, state.length - root.length)
            taken = {tree.tokens[child] for child in tree.children(parent)} | {right}
            wrong = next(t for t in range(2, self._model.n_vocab) if t not in taken)
            token = right if node in self._right else wrong
            states.append(state.after(token))
            tree.add(parent, Offer(token, 1.0, self.name), 1.0)
        self._model.spoil_outputs()
        return tree

    def observe(self, cycle: Cycle) -> None:
        self.accepted.append(len(cycle.verdict.accepted))


def shapes(n_nodes: int) -> Iterator[list[int]]:
    """Every ordered tree of `n_nodes` nodes below the root, as lists of parents."""
    if n_nodes == 0:
        yield []
        return
    for parents in shapes(n_nodes - 1):
        # in depth-first order the next node hangs below the last one or one of its ancestors
        node = n_nodes - 2
        while True:
            yield [*parents, node]
            if node == -1:
                break
            node = parents[node]


def decode_plainly(
    model: FakeModel, prompt: Sequence[int], sampler: GreedySampler, max_tokens: int | None
) -> Generator[int, None, str]:
    """Plain decoding in its simplest form, the measure of the engine: one token a pass.

    Yields the tokens; returns the stop reason.
    """
    model.decode(prompt, n_outputs=1)
    for n in range(1, model.n_ctx + 2):
        token = sampler.sample(model, 0)
        if model.is_eog(token):
            return "eos"
        yield token
        if n == max_tokens:
            return "length"
        if len(model.tokens) == model.n_ctx:
            return "context"
        model.decode([token], n_outputs=1)
    raise AssertionError("a context cannot take that many tokens")
