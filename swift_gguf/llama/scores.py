"""Log-probabilities without a matrix of logits.

llama_cpp reads them off a matrix of a row for every position of the context, and a column for every
token of the vocabulary: gigabytes.  Of a row it needs the likeliest few tokens and the ones that
stand there, so that is what is kept of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from llama_cpp import Llama, LlamaState
from numpy.typing import NDArray

Row: TypeAlias = NDArray[np.float32]


class LogProbs(np.ndarray[Any, Any]):
    """A row of log-probabilities, [n_vocab]; -inf where none was kept."""


class Records:
    """Of each position that was recorded: its likeliest tokens and some others."""

    def __init__(self, *, n_top: int) -> None:
        """n_top: likeliest tokens kept, and all that are as likely as the last of them."""
        self._n_top = n_top
        self._kept: dict[int, tuple[NDArray[np.int64], Row]] = {}

    def add(self, position: int, logits: Row, *others: int) -> None:
        """The row of logits after the token at `position`; `others` are kept, too."""
        probabilities = Llama.logits_to_logprobs(logits)
        n_vocab = len(probabilities)
        ids = np.array(others, np.int64)
        if self._n_top > 0:
            last = n_vocab - min(self._n_top, n_vocab)
            likely = np.flatnonzero(probabilities >= np.partition(probabilities, last)[last])
            ids = np.concatenate((likely, ids))
        self._kept[position] = ids, probabilities[ids]

    def row(self, position: int, n_vocab: int) -> LogProbs | None:
        """None if it was not recorded."""
        if position not in self._kept:
            return None
        ids, probabilities = self._kept[position]
        row = np.full(n_vocab, -np.inf, np.float32)
        row[ids] = probabilities
        return row.view(LogProbs)


class Scores:
    """In the place of llama_cpp's `_scores`, [n_tokens, n_vocab], of which it has some rows: those
    recorded, as log-probabilities, and the latest, as logits; the others are not a number."""

    def __init__(
        self, n_tokens: int, n_vocab: int, records: Records | None, latest: Callable[[], Row | None]
    ) -> None:
        self._n_tokens, self._n_vocab = n_tokens, n_vocab
        self._records, self._latest = records, latest

    @property
    def shape(self) -> tuple[int, int]:
        return self._n_tokens, self._n_vocab

    def __len__(self) -> int:
        return self._n_tokens

    def __getitem__(self, key: Any) -> Any:
        """`[i]` and `[i, :]` are rows, `[i:]` goes through some."""
        first = key[0] if isinstance(key, tuple) else key
        if isinstance(first, slice):
            return self._rows(range(self._n_tokens)[first])
        row = self._row(range(self._n_tokens)[first])
        return row[key[1]] if isinstance(key, tuple) else row

    def _rows(self, positions: range) -> Iterator[Row]:
        return (self._row(position) for position in positions)

    def _row(self, position: int) -> Row:
        row: Row | None = None
        if self._records:
            row = self._records.row(position, self._n_vocab)
        if row is None and position == self._n_tokens - 1:
            row = self._latest()
        # llama_cpp looks at more rows than it needs
        return np.broadcast_to(np.float32(np.nan), self._n_vocab) if row is None else row

    def copy(self) -> Row:
        """What a saved state holds of it: nothing, in a shape that any `Llama` can load."""
        return np.zeros((1, 1), np.float32)


def without_scores(state: Any) -> Any:
    """A `LlamaState` without its logits."""
    return LlamaState(
        input_ids=state.input_ids,
        scores=state.scores[:0],
        n_tokens=state.n_tokens,
        llama_state=state.llama_state,
        llama_state_size=state.llama_state_size,
        seed=state.seed,
    )
