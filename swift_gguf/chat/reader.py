"""Separates an answer into thoughts and text."""

from __future__ import annotations

from collections.abc import Sequence

from swift_gguf.model import Model
from swift_gguf.session import Piece
from swift_gguf.text import StreamDecoder, piece
from swift_gguf.text.thinking import MARKS, Part, Thoughts

_CONTROLS = frozenset({"<think>", "</think>", "[THINK]", "[/THINK]"}) | frozenset(
    {"<|channel|>", "<|message|>", "<|start|>", "<|end|>"}
)


class Reader:
    """Turns the pieces of an answer into parts, and counts the tokens of its thoughts.

    is_open: the prompt has already begun the thoughts.
    """

    def __init__(self, model: Model, *, is_open: bool = False) -> None:
        self.thoughts = Thoughts(is_open=is_open)
        self._model = model
        self._n = 0
        self._begin: int | None = None

    def feed(self, item: Piece) -> list[Part]:
        """The parts that a piece completes."""
        parts = self.thoughts.feed(item.text or _control(self._model, item.token))
        if self._begin is None and any(not part.is_thought for part in parts):
            self._begin = self._n
        self._n += 1
        return parts

    def finish(self, rest: str = "") -> list[Part]:
        """The remaining parts, after the last piece."""
        return self.thoughts.feed(rest) + self.thoughts.finish()

    @property
    def thought_n(self) -> int:
        """Number of tokens before the text of the answer; 0 if there are no thoughts."""
        if not self.thoughts.thought:
            return 0
        return self._n if self._begin is None else self._begin


def _control(model: Model, token: int) -> str:
    """The text of a control token that marks thoughts; empty for all others."""
    text = piece(model, token, special=True).decode("utf-8", "replace")
    return text if text in _CONTROLS else ""


def read(model: Model, tokens: Sequence[int]) -> tuple[list[Part], int]:
    """The parts of a complete answer, and the number of tokens that are thoughts."""
    decoder = StreamDecoder(model)
    text = "".join(map(decoder.feed, tokens)) + decoder.finish()
    # if the prompt has begun the thoughts, the answer has only the mark that ends them
    is_open = any(end in text and begin not in text for begin, end in MARKS[:2])
    reader, decoder = Reader(model, is_open=is_open), StreamDecoder(model)
    parts: list[Part] = []
    for token in tokens:
        parts += reader.feed(Piece(decoder.feed(token), token, ""))
    parts += reader.finish(decoder.finish())
    return parts, reader.thought_n
