"""Drafts the tokens that followed an earlier occurrence of the end of the text.

The text is the prompt and the answer so far.  This is prompt lookup (Saxena 2023) with the longest
match, which a suffix automaton finds (Blumer et al. 1985), as in SAM Decoding (Hu et al., ACL
2025).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TypeAlias

from swift_gguf.drafting.tree import Offer

ROOT = 0
NO_STATE = -1
REFRESHED = 8
SLICE = 4096

Match: TypeAlias = tuple[int, int]
"""A state of the automaton, and the number of latest tokens that match there."""


class NGram:
    """Offers the tokens that followed earlier occurrences of the text's end.

    The first offer after a match of L tokens has a confidence of L / (L + 1).  Each further offer
    has half of the remaining confidence.
    """

    name = "ngram"

    def __init__(self, *, n_offers: int = 3, min_match: int = 1) -> None:
        """n_offers: the number of offers at most.
        min_match: the shortest match in tokens that gives offers."""
        if n_offers < 1 or min_match < 1:
            raise ValueError("n_offers and min_match must be at least 1")
        self._n_offers = n_offers
        self._min_match = min_match
        self._forget()

    def _forget(self) -> None:
        self._text: list[int] = []
        self._index = SuffixAutomaton()
        self._matches: dict[tuple[int, ...], Match] = {(): self._index.repeated_end}

    def follow(self, text: Sequence[int]) -> None:
        """Sets the text that is continued.

        If it starts with the text of the last call, only the new tokens are indexed.
        """
        if not _starts_with(text, self._text):
            self._forget()
        new = text[len(self._text) :]
        try:
            for token in new:
                self._index.append(token)
        except BaseException:  # an interrupted append leaves a broken index
            self._forget()
            raise
        self._text += new
        self._matches = {(): self._index.repeated_end}

    def offers(self, path: Sequence[int]) -> list[Offer]:
        """The tokens that followed the longest matching end of the text and `path`, latest first.

        See `SuffixAutomaton.append` for the order.
        """
        state, length = self._match(tuple(path))
        if length < self._min_match:
            return []
        confidence, left = length / (length + 1), 1 / (length + 1)
        offers = []
        for token in islice(self._index.continuations(state), self._n_offers):
            offers.append(Offer(token, confidence))
            confidence = left = left / 2
        return offers

    def _match(self, path: tuple[int, ...]) -> Match:
        """The match after `path`.  Matches are cached by path until the next `follow`."""
        known = len(path)
        while path[:known] not in self._matches:
            known -= 1
        match = self._matches[path[:known]]
        for end in range(known, len(path)):
            match = self._index.step(match, path[end])
            self._matches[path[: end + 1]] = match
        return match


def _starts_with(text: Sequence[int], start: list[int]) -> bool:
    """True if `text` starts with `start`.

    It compares lists of a limited length, which is fast and does not copy a long text.
    """
    return all(
        [*text[i : min(i + SLICE, len(start))]] == start[i : i + SLICE]
        for i in range(0, len(start), SLICE)
    )


class SuffixAutomaton:
    """All substrings of a growing text, and the tokens that follow them.

    All substrings of a state end at the same places of the text.  Each is a suffix of the state's
    longest substring.  The link of a state leads to the state of the next shorter suffix, which
    also ends at other places.
    """

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]  # for each state, by token; the latest token last
        self._link = [NO_STATE]
        self._length = [0]  # for each state, the length of its longest substring
        self._whole = ROOT  # the state of the whole text

    @property
    def repeated_end(self) -> Match:
        """The longest end of the text that also occurs earlier."""
        link = self._link[self._whole]
        return (ROOT, 0) if link == NO_STATE else (link, self._length[link])

    def append(self, token: int) -> None:
        """Appends a token in O(1), amortised over the text.

        `token` becomes the latest continuation of every end of the text that it follows for the
        first time.  Of the other ends, it does so for those in the `REFRESHED` longest states.  In
        usual texts these are all.  A text such as "aaaa" has as many states as tokens.
        """
        whole = self._add({}, self._length[self._whole] + 1)
        state = self._whole
        while state != NO_STATE and token not in self._next[state]:
            self._next[state][token] = whole
            state = self._link[state]
        if state == NO_STATE:
            self._link[whole] = ROOT
        else:
            self._refresh(state, token)
            self._link[whole] = self._longest(state, token)
        self._whole = whole

    def step(self, match: Match, token: int) -> Match:
        """The longest match that ends with `token`, given the longest match before it.

        A match must have a continuation in the text, so the end of the text alone does not count.
        """
        state, length = match
        while token not in self._next[state]:
            if state == ROOT:
                return ROOT, 0
            state = self._link[state]
            length = self._length[state]
        state, length = self._next[state][token], length + 1
        return (state, length) if self._next[state] else self.repeated_end

    def continuations(self, state: int) -> Iterator[int]:
        """The tokens that follow a state, the latest first."""
        return reversed(self._next[state])

    def _add(self, following: dict[int, int], length: int) -> int:
        self._next.append(following)
        self._link.append(NO_STATE)
        self._length.append(length)
        return len(self._length) - 1

    def _refresh(self, state: int, token: int) -> None:
        for _ in range(REFRESHED):
            following = self._next[state]
            following[token] = following.pop(token)  # a dict keeps the order of insertion
            state = self._link[state]
            if state == NO_STATE:
                return

    def _longest(self, state: int, token: int) -> int:
        """The state whose longest substring is the longest substring of `state` and `token`.

        If there is none, it is split off from the state that has longer substrings, too.
        """
        longer = self._next[state][token]
        length = self._length[state] + 1
        if self._length[longer] == length:
            return longer
        split = self._add(dict(self._next[longer]), length)
        self._link[split] = self._link[longer]
        self._link[longer] = split
        while state != NO_STATE and self._next[state].get(token) == longer:
            self._next[state][token] = split
            state = self._link[state]
        return split
