"""What a completion goes on from: a text, token ids, or what stands before and after a gap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift_gguf.errors import UnsupportedModelError
from swift_gguf.native import library
from swift_gguf.text import one_bos


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it, and as the client wrote it."""

    tokens: list[int]
    written: range
    """Which of them are the client's own."""
    given: str | None = None
    """None: token ids were."""

    @classmethod
    def of(cls, llama: Any, given: str | Sequence[int], suffix: str | None = None) -> Prompt:
        """given: a text gets the start token that the model's vocabulary adds, once; ids get none.
        suffix: what stands after the gap that is to be filled.

        Raises:
            ValueError: it is empty, and the model has no start token.
            UnsupportedModelError: the model knows no gaps.
        """
        if suffix is not None:
            return _around_a_gap(llama, given, suffix)
        if not isinstance(given, str):
            return cls(list(given), range(len(given)))
        bos = llama.token_bos()
        written = _tokenize(llama, given)
        start = _start(llama)
        if not given and not start and bos >= 0:
            start = [bos]
        tokens = one_bos(start + written, bos)
        if not tokens:
            raise ValueError("the prompt is empty, and the model has no token to start with")
        first = len(tokens) - len(written)
        return cls(tokens, range(first, first + len(written)), given)

    def text(self, llama: Any) -> str:
        """What an echo says; of token ids, what they stand for."""
        if self.given is not None:
            return self.given
        return b"".join(self.pieces(llama)).decode("utf-8", "ignore")

    def pieces(self, llama: Any) -> list[bytes]:
        """Of each of the written tokens, as `text` has it."""
        pieces = [piece(llama, self.tokens[i]) for i in self.written]
        if self.given is not None and b"".join(pieces) == b" " + self.given.encode():
            pieces[0] = pieces[0][1:]  # some vocabularies put a blank before a text
        return pieces


def piece(llama: Any, token: int) -> bytes:
    """The bytes a token stands for, control tokens included; none for what is no token."""
    if not 0 <= token < llama._n_vocab:
        return b""
    return library().token_bytes(llama._model.vocab, token, special=True)


def gap_tokens(vocab: Any) -> tuple[int, int, int] | None:
    """The tokens before a prefix, a suffix and the middle that is to be written, if there are."""
    api = library().api
    found = tuple(getattr(api, f"llama_vocab_fim_{name}")(vocab) for name in ("pre", "suf", "mid"))
    return None if min(found) < 0 else found


def _around_a_gap(llama: Any, given: str | Sequence[int], suffix: str) -> Prompt:
    """Laid out as llama-server's ``/infill`` has it."""
    marks = gap_tokens(llama._model.vocab)
    if marks is None:
        raise UnsupportedModelError(
            "this model cannot fill a gap before a suffix: its vocabulary has no FIM tokens"
        )
    prefix = _tokenize(llama, given, special=False) if isinstance(given, str) else list(given)
    before = [marks[0], *prefix]
    after = [marks[1], *_tokenize(llama, suffix, special=False)]
    body = after + before if llama.spm_infill else before + after
    tokens = [*_start(llama), *body, marks[2]]
    first = len(tokens) - 1 - len(prefix) - (0 if llama.spm_infill else len(after))
    written = range(first, first + len(prefix))
    return Prompt(tokens, written, given if isinstance(given, str) else None)


def _tokenize(llama: Any, text: str, *, special: bool = True) -> list[int]:
    if not text:
        return []
    return list(llama.tokenize(text.encode("utf-8"), add_bos=False, special=special))


def _start(llama: Any) -> list[int]:
    """What the vocabulary puts before a text; what it may put behind one would end it."""
    model, start = llama._model, llama._model.token_cls()
    start = llama.token_bos() if start < 0 else start
    return [start] if model.add_bos_token() and start >= 0 else []
