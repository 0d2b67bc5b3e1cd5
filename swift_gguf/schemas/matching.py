"""Applies a constraint to an answer: rules out the tokens that do not fit before each draw."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from swift_gguf.errors import GrammarError
from swift_gguf.native import library
from swift_gguf.schemas.constraint import Constraint, compiled

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_COMPILED = 16
"""Compiled constraints that a vocabulary keeps."""
_MARK = b"\xff"
"""Prefix that tells llguidance that a token is not text; UTF-8 never has this byte."""


class Vocabulary:
    """The texts of a model's tokens.

    pieces: the bytes of every token; empty if it is not text.
    ends: the tokens that end an answer.
    """

    def __init__(self, pieces: Sequence[bytes], ends: Sequence[int]) -> None:
        self._pieces, self._ends = pieces, list(ends)
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()

    @classmethod
    def of(cls, vocab: Any) -> Vocabulary:
        """From llama.cpp's ``llama_vocab``.  Takes a second for 150,000 tokens: keep the result."""
        return cls(*library().pieces(vocab))

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher for a new answer.

        Raises:
            GrammarError: the constraint is too complex for this vocabulary.
        """
        found = self._compiled.pop(constraint, None)
        if found is None:
            found = compiled(constraint.grammar, self._tokenizer, constraint.levels)
            if found.is_error():
                raise GrammarError(_too_much(found))
            if len(self._compiled) == MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled[constraint] = found
        return Matcher(found.deep_copy(), len(self._pieces))

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        marked = [piece or b"%b%d" % (_MARK, i) for i, piece in enumerate(self._pieces)]
        for end in self._ends:
            marked[end] = b"%b%d" % (_MARK, end)
        # without slices, this takes half the time, and a mask still takes only 0.1 ms
        tokens: Any = _Tokens(marked, self._ends)
        return LLTokenizer(tokens, eos_token=self._ends or None, slices=[])


class _Tokens:
    """A tokenizer with the attributes that llguidance needs."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: Sequence[bytes], ends: Sequence[int]) -> None:
        self.tokens, self.eos_token_id = tokens, ends[0] if ends else None

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("the model chooses its tokens")


class Matcher:
    """The state of one answer under a constraint."""

    def __init__(self, matcher: LLMatcher, n_vocab: int) -> None:
        self._matcher, self._n_vocab = matcher, n_vocab
        self._mask: NDArray[np.bool_] | None = None  # for the next token; None until computed

    def mask(self) -> NDArray[np.bool_]:
        """The tokens that may come next: [n_vocab].

        Raises:
            GrammarError: the schema is too complex.
        """
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarError(_too_much(self._matcher))
        allowed = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        self._mask = allowed[: self._n_vocab].view(np.bool_)
        return self._mask

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Sets the logits of all tokens that do not fit to -inf.

        logits: [n_vocab].

        Raises:
            GrammarError: the schema is too complex.
        """
        logits[: self._n_vocab][~self.mask()] = -np.inf

    def accept(self, token: int) -> None:
        """Appends a token to the answer.

        Raises:
            GrammarError: the token does not fit, or the schema is too complex.
        """
        fitted, self._mask = self._mask is not None and self._mask[token], None
        if not self._matcher.consume_token(token):
            if fitted:
                raise GrammarError(_too_much(self._matcher))
            raise GrammarError(f"token {token} does not fit the schema here")

    def fork(self) -> Matcher:
        """An independent copy of the matcher in this state."""
        return Matcher(self._matcher.deep_copy(), self._n_vocab)


def _too_much(matcher: Any) -> str:
    said = matcher.get_error().splitlines()[0][:160]
    return f"the schema is too complex ({said}); make its patterns and unions simpler"
