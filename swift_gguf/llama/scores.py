"""Log-probabilities without a matrix of logits.

llama_cpp reads them off a matrix of a row for every position of the context, and a column for every
token of the vocabulary: gigabytes.  Of a row, an answer needs the likeliest few tokens and the one
that follows, so that is what is kept of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from llama_cpp import Llama, LlamaState
from numpy.typing import NDArray

Row: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Scored:
    """A token, and what the model gave for it."""

    token: int
    logprob: float | None
    """None: nothing stood before it."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place, likeliest first, with their log-probabilities."""

    @classmethod
    def of(cls, logits: Row, token: int, n_top: int) -> Scored:
        """By the row of logits, [n_vocab], that the token follows."""
        logprobs = Llama.logits_to_logprobs(logits)
        ids: NDArray[np.int64] = np.empty(0, np.int64)
        if n_top := min(n_top, len(logprobs)):
            least = np.partition(logprobs, -n_top)[-n_top]
            ids = np.flatnonzero(logprobs >= least)
            ids = ids[np.lexsort((ids, logprobs[ids]))][::-1][:n_top]  # ties as llama_cpp has them
        top = tuple((int(id), float(logprobs[id])) for id in ids)
        return cls(token, float(logprobs[token]), top)


class Records:
    """What is kept of each row that log-probabilities are asked of.

    n_top: likeliest tokens.
    """

    def __init__(self, *, n_top: int) -> None:
        self._n_top = n_top
        self._kept: dict[int, Scored] = {}

    def add(self, position: int, logits: Row, token: int) -> None:
        """The row of logits after `position`, where `token` follows."""
        self._kept[position] = Scored.of(logits, token, self._n_top)

    def after(self, position: int) -> Scored:
        """The token that follows `position`."""
        return self._kept[position]


class LogProbs(dict[str, Any]):
    """OpenAI's `logprobs` of a completion, and `content`, those of a chat.

    scored: tokens in their order.
    offsets: where each begins, in characters of the prompt and the answer.
    piece: the bytes of a token, control tokens included.
    """

    def __init__(
        self, scored: Sequence[Scored], offsets: Sequence[int], piece: Callable[[int], bytes]
    ) -> None:
        super().__init__(
            tokens=[name(piece(one.token)) for one in scored],
            text_offset=list(offsets),
            token_logprobs=[one.logprob for one in scored],
            top_logprobs=[_by_name(one, piece) for one in scored],
        )
        self.content = [
            {
                **_named(piece(one.token), one.logprob),
                "top_logprobs": [_named(piece(id), logprob) for id, logprob in one.top],
            }
            for one in scored
        ]


def name(piece: bytes) -> str:
    """A token in words: its text, or its bytes where they are part of a character."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return in_bytes(piece)


def in_bytes(piece: bytes) -> str:
    """OpenAI's way to name bytes."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _named(piece: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": name(piece), "logprob": logprob, "bytes": list(piece)}


def _by_name(one: Scored, piece: Callable[[int], bytes]) -> dict[str, float] | None:
    """The likeliest tokens and the one itself; two of the same text are apart by their bytes."""
    if one.logprob is None:
        return None
    found: dict[str, float] = {}
    for id, logprob in dict([*one.top, (one.token, one.logprob)]).items():
        key = name(piece(id))
        found[in_bytes(piece(id)) if key in found else key] = logprob
    return found


class Scores:
    """In the place of llama_cpp's `_scores`, [n_tokens, n_vocab], of which it has the latest row;
    the others are not a number."""

    def __init__(self, n_tokens: int, n_vocab: int, latest: Callable[[], Row]) -> None:
        self._n_tokens, self._n_vocab, self._latest = n_tokens, n_vocab, latest

    @property
    def shape(self) -> tuple[int, int]:
        return self._n_tokens, self._n_vocab

    def __len__(self) -> int:
        return self._n_tokens

    def __getitem__(self, key: Any) -> Any:
        """`[i]` and `[i, :]` are rows."""
        first = key[0] if isinstance(key, tuple) else key
        row = self._row(range(self._n_tokens)[first])
        return row[key[1]] if isinstance(key, tuple) else row

    def _row(self, position: int) -> Row:
        if position == self._n_tokens - 1:
            return self._latest()
        # llama_cpp looks at more rows than it needs
        return np.broadcast_to(np.float32(np.nan), self._n_vocab)

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
