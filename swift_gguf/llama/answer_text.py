"""An answer's text as its tokens come: whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Told:
    """Tokens whose text goes out together."""

    text: str
    n_tokens: int


@dataclass
class _Group:
    """Tokens that end with a character, and not before."""

    texts: list[str]
    end: int
    """In bytes of the answer."""


class AnswerText:
    """What may be told of an answer, and when.

    Characters that are split over several tokens wait for the last of them, and what a stop string
    may have begun with waits until that is known.  Bytes that are no UTF-8 are left out.

    stops: the one that begins first in the text ends it.
    by_token: each token is told by itself, though its text may be empty.
    """

    def __init__(self, stops: Sequence[bytes] = (), *, by_token: bool = False) -> None:
        self._stops = tuple(filter(None, stops))
        self._longest = max(map(len, self._stops), default=0)
        self._by_token = by_token
        self._said = bytearray()
        self._ends: list[int] = []
        self._waiting: list[_Group] = []
        self._texts: list[str] = []
        """Of the tokens since the last whole character."""
        self._utf8 = _decoder()
        self._n_told = self._told_end = 0
        self._cut: int | None = None

    @property
    def is_stopped(self) -> bool:
        """Was a stop string said?"""
        return self._cut is not None

    @property
    def is_whole(self) -> bool:
        """Does it end with a character, as far as it goes?"""
        return not self._texts

    def feed(self, piece: bytes) -> Iterator[Told]:
        """What the next token, which stands for `piece`, completes."""
        before = len(self._said)
        self._said += piece
        self._ends.append(len(self._said))
        self._cut = self._begin_of_stop(max(0, before - self._longest + 1))
        if self._cut is not None:
            return
        self._texts.append(self._utf8.decode(piece))
        if not self._utf8.getstate()[0]:
            self._waiting.append(_Group(self._texts, len(self._said)))
            self._texts = []
        safe = len(self._said) - self._held()
        while self._waiting and self._waiting[0].end <= safe:
            group = self._waiting.pop(0)
            self._n_told += len(group.texts)
            self._told_end = group.end
            yield from self._telling(group.texts)

    def finish(self) -> Iterator[Told]:
        """What is left when no token follows."""
        end = len(self._said) if self._cut is None else self._cut
        utf8, start = _decoder(), self._told_end
        texts = []
        for token_end in self._ends[self._n_told :]:
            if self._cut is not None and start >= end:
                break
            texts.append(utf8.decode(self._said[start : min(token_end, end)]))
            start = token_end
        return self._telling(texts)

    def _telling(self, texts: list[str]) -> Iterator[Told]:
        if self._by_token:
            yield from (Told(text, 1) for text in texts)
        elif texts:
            yield Told("".join(texts), len(texts))

    def _begin_of_stop(self, start: int) -> int | None:
        found = (self._said.find(stop, start) for stop in self._stops)
        return min((position for position in found if position >= 0), default=None)

    def _held(self) -> int:
        """Bytes at the end that may be the beginning of a stop string."""
        return max((_overlap(self._said, stop) for stop in self._stops), default=0)


def _overlap(said: bytearray, stop: bytes) -> int:
    """How much of `stop`, but not all of it, `said` ends with."""
    begin = said.find(stop[:1], max(0, len(said) - len(stop) + 1))
    while begin >= 0 and not stop.startswith(said[begin:]):
        begin = said.find(stop[:1], begin + 1)
    return len(said) - begin if begin >= 0 else 0


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("ignore")
