"""Copies of the attention matrices with fewer bits, for drafts.

With narrow FFNs and a small head, attention is at least two fifths of a draft pass
(docs/lab/drafts.md).  The KV cache is still the model's own: the entries that a draft adds are
removed before the target's pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from gguf import GGMLQuantizationType

from swift_gguf.prepare.weights import KindOf, Sidecar, Weights, bytes_each

PARTS = ("q", "k", "v", "qkv", "output")
WORTH_A_COPY = 0.6
"""Maximum size of a copy relative to the original: 4 bits for 8 bits, but not for 6."""


def copied(
    weights: Weights, layers: Iterable[int], kind_of: KindOf
) -> Iterator[tuple[str, GGMLQuantizationType]]:
    """The matrices that get a copy, and the type of the copy."""
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
    """Adds all copies to the sidecar."""
    for name, kind in copied(weights, layers, kind_of):
        sidecar.add_rows(name, weights, np.arange(weights.shape(name)[0]), kind)
