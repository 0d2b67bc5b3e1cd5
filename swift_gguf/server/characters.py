"""Characters that are split over several tokens, whole in a stream, whatever comes after them.

llama_cpp holds such tokens back until they are a character, except at the end of an answer: what it
still held back then (because a stop might have begun, say) it decodes token by token, and drops
what is no character by itself; the same with log-probabilities, which come token by token.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Said:
    """What a generation said so far."""

    pieces: list[bytes] = field(default_factory=list)
    """Of each token, an end of generation excluded."""
    is_over: bool = False

    def text(self, stops: Sequence[str]) -> str:
        """All of it, as an answer that is no stream has it."""
        said = b"".join(self.pieces)
        for stop in stops:
            if stop.encode() in said:
                said = said[: said.index(stop.encode())]
                break
        return said.decode("utf-8", "ignore")


def whole(
    chunks: Iterator[dict[str, Any]],
    generation: Callable[[], Said],
    *,
    stops: Sequence[str],
    by_token: bool,
) -> Iterator[dict[str, Any]]:
    """Chunks of a text completion, with their texts mended.

    generation: what is said by the generation that the chunks come of.
    by_token: each chunk is a token.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")("ignore")
    sent = n_tokens = 0
    for chunk in chunks:
        choice, said = chunk["choices"][0], generation()
        if choice["finish_reason"] is None:
            if by_token and n_tokens < len(said.pieces):
                choice["text"] = utf8.decode(said.pieces[n_tokens])
                n_tokens += 1
            if said.is_over:
                rest = said.text(stops)[sent:]
                # all that is left comes with the first of the chunks that are left
                choice["text"] = rest[: len(choice["text"])] if by_token else rest
            sent += len(choice["text"])
            if not (choice["text"] or choice["logprobs"]):
                continue
        yield chunk
