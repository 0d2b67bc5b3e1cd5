"""Offers what the target itself was about to say after the same token when it was last seen.

Token Recycling (Luo et al., ACL 2025): every verification shows the target's likeliest tokens
after each token it was given, and most of that would be thrown away.  Beside the paper's rows for a
token there are rows for a pair of tokens, which know better where they know anything.
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
        """n_offers: successors kept of each row at most; 8 in the paper."""
        if n_offers < 1 or max_rows < 1:
            raise ValueError("a recycling table needs at least one row of one token")
        self._n_offers = n_offers
        self._max_rows = max_rows
        self._rows: OrderedDict[Context, Row] = OrderedDict()  # the latest learned last
        self._end: Context = ()  # of the text

    def __len__(self) -> int:
        """Rows."""
        return len(self._rows)

    def follow(self, text: Sequence[int]) -> None:
        """`text` is what will be continued."""
        self._end = tuple(text[-2:])

    def offers(self, path: Sequence[int]) -> Row:
        """The target's probabilities after the last two tokens of the text and then `path`, when it
        was last given these; or half of those after the last one, which says less: likeliest first.
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
        """The target goes on with `successors` after `token`, likeliest first.

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
        """The table that `to_rows` gave; of too many rows, the latest.

        Raises:
            ValueError: it cannot have given them, or not for a vocabulary of `n_vocab` tokens.
        """
        table = cls(n_offers=n_offers, max_rows=max_rows)
        seen: set[Context] = set()
        for values in _list(rows):
            context, row = _parse(values, n_vocab)
            if context in seen:
                raise ValueError(f"two rows of {context}")
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
            raise ValueError(f"{token!r:.40} is not one of {n_vocab} tokens")
    for p in probabilities:
        if not isinstance(p, (int, float)) or isinstance(p, bool) or not 0 <= p <= 1:
            raise ValueError(f"{p!r:.40} is not a probability")
    if len(context) not in (1, 2):
        raise ValueError(f"successors of {len(context)} tokens")
    if not successors or len(successors) != len(probabilities):
        raise ValueError(f"{len(probabilities)} probabilities of {len(successors)} successors")
    if len(set(successors)) < len(successors):
        raise ValueError(f"a successor of {context} is there twice")
    if probabilities != sorted(probabilities, reverse=True):
        raise ValueError(f"the successors of {context} do not begin with the likeliest")
    return tuple(context), tuple(map(Offer, successors, map(float, probabilities)))


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r:.60} is not a list")
    return value
