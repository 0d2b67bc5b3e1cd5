"""Looks up what followed the longest repeated end of the text, in the prompt and the answer so far.

Prompt lookup (Saxena 2023) with the exact longest match that a suffix automaton gives (Blumer et
al. 1985), as in SAM Decoding (Hu et al., ACL 2025).
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
"""A state of the automaton, and how many of the latest tokens are matched there."""


class NGram:
    """Offers what followed where the text's end occurred before.

    The first offer after a match of L tokens has a confidence of L / (L + 1), each further one half
    of what is left.
    """

    name = "ngram"

    def __init__(self, *, n_offers: int = 3, min_match: int = 1) -> None:
        """n_offers: different tokens offered at most.
        min_match: a shorter match, in tokens, offers nothing."""
        if n_offers < 1 or min_match < 1:
            raise ValueError("an n-gram lookup needs at least one offer and one token to match")
        self._n_offers = n_offers
        self._min_match = min_match
        self._forget()

    def _forget(self) -> None:
        self._text: list[int] = []
        self._index = SuffixAutomaton()
        self._matches: dict[tuple[int, ...], Match] = {(): self._index.repeated_end}

    def follow(self, text: Sequence[int]) -> None:
        """`text` is what will be continued.

        Where it goes on from the text before, only what is new is indexed; otherwise all of it.
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
        """What the text shows after the longest end of itself and then `path` that it goes on from
        somewhere, the latest first (see `SuffixAutomaton.append`)."""
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
        """Walks on from the longest beginning of `path` that was asked for since `follow`."""
        known = len(path)
        while path[:known] not in self._matches:
            known -= 1
        match = self._matches[path[:known]]
        for end in range(known, len(path)):
            match = self._index.step(match, path[end])
            self._matches[path[: end + 1]] = match
        return match


def _starts_with(text: Sequence[int], start: list[int]) -> bool:
    """In slices, at C speed: a long text is never copied as a whole."""
    return all(
        [*text[i : min(i + SLICE, len(start))]] == start[i : i + SLICE]
        for i in range(0, len(start), SLICE)
    )


class SuffixAutomaton:
    """Every substring of a text that only grows, and what follows it.

    The substrings of a state end at the same places of the text; each is the longest of them less
    some tokens at its front.  One token less than the shortest occurs elsewhere, too: that is in
    the state's link.
    """

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]  # by token; in each state the latest token last
        self._link = [NO_STATE]
        self._length = [0]  # of the longest substring of a state
        self._whole = ROOT  # the state of the whole text

    @property
    def repeated_end(self) -> Match:
        """The longest end of the text that occurs before, too."""
        link = self._link[self._whole]
        return (ROOT, 0) if link == NO_STATE else (link, self._length[link])

    def append(self, token: int) -> None:
        """O(1), amortised over the text.

        `token` becomes the latest continuation of every end of the text that it has not followed
        before.  Of those that it has, only for the longest `REFRESHED` states: all there are in
        usual texts, but in "aaaa" as many as tokens.
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
        """The longest match that ends with `token`, given the longest before it.

        Both are of substrings that the text goes on from: what it merely ends with is not one.
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
        """The tokens that follow, the latest first."""
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
        """The state whose longest substring is `token` after the longest of `state`.

        Where there is none, what has just occurred without the longer substrings of its state is
        split off.
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
