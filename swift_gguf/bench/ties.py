"""Tells rounding from a bug if an answer differs from plain decoding.

On some backends, llama.cpp's rounding depends on the batch size.  Then a verified answer may differ
from a plainly decoded one, but only where two tokens have almost the same logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swift_gguf.model import Model
from swift_gguf.tokens import common_prefix

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
"""Usual batch sizes of a verification."""
PROBED_WIDTHS = (2, 3, 4, 5, 8, 16, 32)
PROBE_TOKENS = 48


@dataclass(frozen=True)
class Divergence:
    """The first position where a greedy answer differs from plain decoding."""

    position: int
    """Position in the answer."""
    gap: float
    """Difference between the target's logits of the two tokens, at batch size 1."""
    noise: float
    """The largest change of a logit there between batch size 1 and those of a verification."""

    @property
    def is_near_tie(self) -> bool:
        # both logits may change by the noise, in opposite directions
        return self.gap <= 2 * self.noise


def explain(
    model: Model, prompt: Sequence[int], plain: Sequence[int], other: Sequence[int]
) -> Divergence:
    """Measures the first difference between two answers.  Clears the context.

    If one answer is shorter, its token at that position is the end of generation.

    Raises:
        ValueError: the answers are the same.
    """
    if list(plain) == list(other):
        raise ValueError("the answers are the same")
    position = common_prefix(plain, other)
    rows = rows_by_width(model, [*prompt, *plain[:position]], WIDTHS)
    mine, theirs = (_logit(model, rows[0], answer[position:]) for answer in (plain, other))
    noise = max((float(np.abs(row - rows[0]).max()) for row in rows[1:]), default=0.0)
    return Divergence(position, abs(mine - theirs), noise)


def is_bit_invariant(model: Model) -> bool:
    """True if this model's logits are bit-identical for all batch sizes of a verification.

    This is measured, because it depends on quantisation, backend and processor.  Clears the
    context.  A model that cannot be rolled back is never verified, so the answer is True.
    """
    if model.rollback_refusal:
        return True
    try:
        tokens = [7919 * i % model.n_vocab for i in range(PROBE_TOKENS)]
        rows = rows_by_width(model, tokens, PROBED_WIDTHS)
    finally:
        model.clear()
    return all(np.array_equal(row, rows[0]) for row in rows)


def rows_by_width(
    model: Model, tokens: Sequence[int], widths: Sequence[int]
) -> list[npt.NDArray[np.float32]]:
    """Logits of the last token, [n_vocab] each: decoded alone, then in batches of `widths` tokens.

    widths: ascending; those larger than the text are skipped.

    The tokens before are decoded in one batch, as in a generation.
    """
    widths = [width for width in widths if width <= len(tokens)]
    n = max(widths, default=1)
    model.clear()
    if body := tokens[: len(tokens) - n]:
        model.decode(body, n_outputs=0)
    for token in tokens[len(tokens) - n :]:
        model.decode([token])
    rows = [model.logits(0)]
    for width in widths:
        model.rollback(len(tokens) - width)  # the last tokens that stay were decoded one by one
        model.decode(tokens[len(tokens) - width :], n_outputs=width)
        rows.append(model.logits(width - 1))
    return rows


def _logit(model: Model, row: npt.NDArray[np.float32], rest: Sequence[int]) -> float:
    if rest:
        return float(row[rest[0]])
    return max(float(row[token]) for token in range(model.n_vocab) if model.is_eog(token))
