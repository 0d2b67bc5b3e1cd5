"""Attention's matrices in fewer bits, for drafts of models that store them in many.

FFNs narrowed and a small head leave a draft pass that consists of attention for two fifths and more
(docs/lab/drafts.md), read as the model has it.  Its keys and values are the model's own all the
same: what a draft adds to them is gone before the target's pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from gguf import GGMLQuantizationType

from swift_gguf.prepare.weights import KindOf, Sidecar, Weights, bytes_each

PARTS = ("q", "k", "v", "qkv", "output")
WORTH_A_COPY = 0.6
"""Of the original's bytes, at most: 4 bits for 8, but not for 6."""


def copied(
    weights: Weights, layers: Iterable[int], kind_of: KindOf
) -> Iterator[tuple[str, GGMLQuantizationType]]:
    """The matrices that drafts get a copy of, and its type."""
    for layer in layers:
        for part in PARTS:
            name = f"blk.{layer}.attn_{part}"
            if not weights.has(f"{name}.weight") or weights.has(f"{name}.scale"):
                continue
            name += ".weight"
            kind = kind_of(weights.shape(name)[-1])
            if bytes_each(kind) <= WORTH_A_COPY * bytes_each(weights.kind(name)):
                yield name, kind


def add_attention(
    sidecar: Sidecar, weights: Weights, layers: Iterable[int], kind_of: KindOf
) -> None:
    """All copies."""
    for name, kind in copied(weights, layers, kind_of):
        sidecar.add_rows(name, weights, np.arange(weights.shape(name)[0]), kind)
