"""Offers the target's likeliest tokens from the last time that it saw the same token.

This is Token Recycling (Luo et al., ACL 2025).  Every verification gives the target's likeliest
tokens after each of its tokens, and most of them are not used otherwise.  The paper has a row for
each token.  Here there are also rows for pairs of tokens, which are right more often.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeAlias

from swift_gguf.drafting.tree import Offer

MAX_ROWS = 4096

Context: TypeAlias = tuple[int, ...]
"""The latest one or two tokens."""
Row: TypeAlias = tuple[Offer, ...]


class Recycling:
    """A table of the target's likeliest successors of a token, and of a pair of tokens.

    Holds at most `max_rows` rows of both kinds together; the least recently learned are dropped.
    """

    name = "recycling"

    def __init__(self, *, n_offers: int = 4, max_rows: int = MAX_ROWS) -> None:
        """n_offers: the number of successors in a row at most; 8 in the paper."""
        if n_offers < 1 or max_rows < 1:
            raise ValueError("n_offers and max_rows must be at least 1")
        self._n_offers = n_offers
        self._max_rows = max_rows
        self._rows: OrderedDict[Context, Row] = OrderedDict()  # the latest learned last
        self._end: Context = ()  # the last two tokens of the text

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def follow(self, text: Sequence[int]) -> None:
        """Sets the text that is continued."""
        self._end = tuple(text[-2:])

    def offers(self, path: Sequence[int]) -> Row:
        """The successors of the last two tokens of the text and `path`, likeliest first.

        They have the target's probabilities from the last time.  If the pair is not known, they are
        the successors of the last token with half of the probabilities, because one token is a
        weaker context.
        """
        context = (*self._end, *path[-2:])[-2:]
        if len(context) == 2 and (row := self._rows.get(context)):
            return row
        return tuple(
            Offer(offer.token, offer.probability / 2) for offer in self._rows.get(context[-1:], ())
        )

    def learn(
        self,
        token: int,
        successors: Sequence[int],
        probabilities: Sequence[float],
        *,
        previous: int | None = None,
    ) -> None:
        """Stores the target's `successors` of `token`, likeliest first.

        previous: the token before `token`, if there is one.
        """
        pairs = zip(successors[: self._n_offers], probabilities[: self._n_offers], strict=True)
        row = tuple(Offer(int(successor), float(p)) for successor, p in pairs)
        if not row:
            return
        self._put((int(token),), row)
        if previous is not None:
            self._put((int(previous), int(token)), row)

    def to_rows(self) -> list[list[Any]]:
        """Plain values for JSON: `[context, successors, probabilities]`, the latest learned last.

        Probabilities are rounded to 3 digits.
        """
        return [
            [
                list(context),
                [offer.token for offer in row],
                [round(offer.probability, 3) for offer in row],
            ]
            for context, row in self._rows.items()
        ]

    @classmethod
    def from_rows(
        cls, rows: object, *, n_vocab: int, n_offers: int = 4, max_rows: int = MAX_ROWS
    ) -> Recycling:
        """The table from the result of `to_rows`.  If there are too many rows, the latest are kept.

        Raises:
            ValueError: the rows are not valid for a vocabulary of `n_vocab` tokens.
        """
        table = cls(n_offers=n_offers, max_rows=max_rows)
        seen: set[Context] = set()
        for values in _list(rows):
            context, row = _parse(values, n_vocab)
            if context in seen:
                raise ValueError(f"there are two rows for {context}")
            seen.add(context)
            table._put(context, row[:n_offers])
        return table

    def _put(self, context: Context, row: Row) -> None:
        self._rows[context] = row
        self._rows.move_to_end(context)
        if len(self._rows) > self._max_rows:
            self._rows.popitem(last=False)


def _parse(values: object, n_vocab: int) -> tuple[Context, Row]:
    parts = _list(values)
    if len(parts) != 3:
        raise ValueError(f"{values!r:.60} is not a context, its successors and probabilities")
    context, successors, probabilities = map(_list, parts)
    for token in (*context, *successors):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < n_vocab:
            raise ValueError(f"{token!r:.40} is not a token id below {n_vocab}")
    for p in probabilities:
        if not isinstance(p, (int, float)) or isinstance(p, bool) or not 0 <= p <= 1:
            raise ValueError(f"{p!r:.40} is not a probability")
    if len(context) not in (1, 2):
        raise ValueError(f"a context has {len(context)} tokens, not 1 or 2")
    if not successors or len(successors) != len(probabilities):
        raise ValueError(
            f"{context} has {len(successors)} successors and {len(probabilities)} probabilities"
        )
    if len(set(successors)) < len(successors):
        raise ValueError(f"a successor of {context} is listed twice")
    if probabilities != sorted(probabilities, reverse=True):
        raise ValueError(f"the successors of {context} are not in the order of their probability")
    return tuple(context), tuple(map(Offer, successors, map(float, probabilities)))


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r:.60} is not a list")
    return value
