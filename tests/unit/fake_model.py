"""A target, samplers and a drafter without weights: a slip of the engine changes the text."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from swift_gguf.drafting.source import Draft
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
        self._outputs: list[State] = []

    # -- what the engine needs ---------------------------------------------------------------------

    def decode(self, tokens: Sequence[int], *, n_outputs: int) -> None:
        if len(self.tokens) != self.state.length:
            raise ContractViolationError("somebody changed `tokens`")
        if not 1 <= n_outputs <= len(tokens):
            raise ContractViolationError(f"{n_outputs} outputs of {len(tokens)} tokens")
        if len(self.tokens) + len(tokens) > self.n_ctx:
            raise ContractViolationError(
                f"{len(self.tokens)} + {len(tokens)} tokens > {self.n_ctx}"
            )
        if not all(0 <= token < self.n_vocab for token in tokens):
            raise ContractViolationError(f"{tokens} are not all in the vocabulary")
        self.n_decodes += 1
        if self.n_decodes > _ENOUGH:
            raise ContractViolationError("the generation does not get on")
        if self.n_decodes == self.fail_at:
            raise DecodeError("a failure made for a test")
        for token in tokens:
            self._states.append(self.state.after(token))
        self.tokens.extend(tokens)
        self._outputs = self._states[-n_outputs:]
        self.decodes.append((len(tokens), n_outputs))

    def rollback(self, n_past: int) -> None:
        if n_past < 0:
            raise ContractViolationError(f"a rollback to position {n_past}")
        if n_past >= len(self.tokens):
            return
        if self.rollback_refusal:
            raise UnsupportedModelError(self.rollback_refusal)
        del self.tokens[n_past:]
        del self._states[n_past + 1 :]

    def clear(self) -> None:
        self.n_clears += 1
        self.tokens.clear()
        del self._states[1:]

    def is_eog(self, token: int) -> bool:
        return token < self.n_eog

    # -- what samplers and drafters need -----------------------------------------------------------

    @property
    def state(self) -> State:
        return self._states[-1]

    def output(self, row: int) -> State:
        """The state a row of logits comes from; it must still be in the context."""
        if not 0 <= row < len(self._outputs):
            raise ContractViolationError(f"row {row} has no logits")
        state = self._outputs[row]
        if state.length >= len(self._states) or self._states[state.length] != state:
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

    def __init__(
        self,
        model: FakeModel,
        sampler: GreedySampler,
        script: Sequence[str],
        *,
        fail_at: int | None = None,
    ) -> None:
        self.calls: list[DraftCall] = []
        self.fail_at = fail_at
        self._model = model
        self._sampler = sampler
        self._script = script

    def draft(self, pending: int, *, n_max: int) -> Draft:
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
        return Draft(list(tokens), [1.0] * len(tokens))

    def _right(self, right: int) -> int:
        return right

    def _wrong(self, right: int) -> int:
        first, last = self._model.n_eog, self._model.n_vocab - 1
        return right + 1 if first <= right < last else first

    def _end(self, right: int) -> int:
        return right if self._model.is_eog(right) else 0


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
