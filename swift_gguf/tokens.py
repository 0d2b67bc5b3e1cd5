"""Sequences of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two token sequences."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in pairs)
