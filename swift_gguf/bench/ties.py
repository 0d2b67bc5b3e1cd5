"""Telling a bug from rounding, where a text differs from plain decoding's.

Where llama.cpp rounds differently by the width of a batch, a verified text may differ from a
plainly decoded one, but only where the target itself hardly prefers one token to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swift_gguf.model import Model
from swift_gguf.tokens import common_prefix

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
"""Of usual verifications."""
PROBED_WIDTHS = (2, 3, 4, 5, 8, 16, 32)
PROBE_TOKENS = 48


@dataclass(frozen=True)
class Divergence:
    """Where a greedy text first differs from plain decoding's."""

    position: int
    """In the answer."""
    gap: float
    """Between the target's logits of the two tokens, decoded one by one."""
    noise: float
    """The largest change of any logit there from width 1 to those of a verification."""

    @property
    def is_near_tie(self) -> bool:
        # each of the two logits may move by the noise, in opposite directions
        return self.gap <= 2 * self.noise


def explain(
    model: Model, prompt: Sequence[int], plain: Sequence[int], other: Sequence[int]
) -> Divergence:
    """The first difference of two answers, measured on the model, whose context is lost.

    An answer that ended before the other chose an end of generation there.

    Raises:
        ValueError: they do not differ.
    """
    if list(plain) == list(other):
        raise ValueError("the answers are the same")
    position = common_prefix(plain, other)
    rows = rows_by_width(model, [*prompt, *plain[:position]], WIDTHS)
    mine, theirs = (_logit(model, rows[0], answer[position:]) for answer in (plain, other))
    noise = max((float(np.abs(row - rows[0]).max()) for row in rows[1:]), default=0.0)
    return Divergence(position, abs(mine - theirs), noise)


def is_bit_invariant(model: Model) -> bool:
    """Does this model, on this backend, give the same bits at every width of a verification?

    Measured, not looked up: it depends on quantisation, backend and processor.  The context is
    lost.  A model that is never decoded at any other width is.
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
    """Logits after the last token, [n_vocab] each: decoded alone, then as the last of `widths`.

    widths: ascending; those that are wider than the text are left out.

    As in a generation, what comes before is decoded in one go.
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
        model.rollback(len(tokens) - width)  # what is left was decoded one by one
        model.decode(tokens[len(tokens) - width :], n_outputs=width)
        rows.append(model.logits(width - 1))
    return rows


def _logit(model: Model, row: npt.NDArray[np.float32], rest: Sequence[int]) -> float:
    if rest:
        return float(row[rest[0]])
    return max(float(row[token]) for token in range(model.n_vocab) if model.is_eog(token))
