"""Which sub-layers may be left out, and sub-networks as vectors over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swift_gguf.errors import SubnetworkError
from swift_gguf.subnetwork import SubNetwork


@dataclass(frozen=True)
class Space:
    """The sub-layers a search may skip: attention and FFN of some layers.

    The first and the last layer are always kept, as in SWIFT (§4.1).

    Raises:
        SubnetworkError: a layer the model does not have, or nothing that may be skipped.
    """

    n_layer: int
    attn: Sequence[int]
    ffn: Sequence[int]

    def __post_init__(self) -> None:
        SubNetwork(n_layer=self.n_layer, skip_attn=frozenset([*self.attn, *self.ffn]))
        for kind in ("attn", "ffn"):
            inner = set(getattr(self, kind)) - {0, self.n_layer - 1}
            object.__setattr__(self, kind, tuple(sorted(inner)))
        if not self.size:
            raise SubnetworkError(
                "no sub-layer of this model may be skipped; use --speculation ngram"
            )

    @property
    def size(self) -> int:
        return len(self.attn) + len(self.ffn)

    def subnetwork(self, skip: NDArray[np.bool_]) -> SubNetwork:
        """The sub-network that skips where `skip` [size] is true: attention first, then FFNs."""
        flags = np.asarray(skip, dtype=bool)
        attn, ffn = flags[: len(self.attn)], flags[len(self.attn) :]
        return SubNetwork(
            n_layer=self.n_layer,
            skip_attn=frozenset(np.array(self.attn, dtype=int)[attn].tolist()),
            skip_ffn=frozenset(np.array(self.ffn, dtype=int)[ffn].tolist()),
        )

    def mask(self, subnetwork: SubNetwork) -> NDArray[np.bool_]:
        """The inverse of `subnetwork`: [size]."""
        flags = [layer in subnetwork.skip_attn for layer in self.attn]
        flags += [layer in subnetwork.skip_ffn for layer in self.ffn]
        return np.array(flags)

    def __contains__(self, subnetwork: SubNetwork) -> bool:
        return (
            subnetwork.n_layer == self.n_layer
            and subnetwork.skip_attn <= set(self.attn)
            and subnetwork.skip_ffn <= set(self.ffn)
        )

    def singles(self) -> list[SubNetwork]:
        """Each sub-layer left out alone: [size]."""
        return [self.subnetwork(row) for row in np.eye(self.size, dtype=bool)]

    def random(self, rng: np.random.Generator, n_skip: int) -> SubNetwork:
        """`n_skip` of all sub-layers, uniformly."""
        skip = np.zeros(self.size, dtype=bool)
        skip[rng.choice(self.size, min(n_skip, self.size), replace=False)] = True
        return self.subnetwork(skip)

    def every(self, *, attn: int = 0, ffn: int = 0) -> SubNetwork:
        """Every `attn`-th attention and every `ffn`-th FFN left out, evenly; 0: none."""
        return SubNetwork(
            n_layer=self.n_layer,
            skip_attn=frozenset(self.attn[attn // 2 :: attn] if attn else ()),
            skip_ffn=frozenset(self.ffn[ffn // 2 :: ffn] if ffn else ()),
        )

    def uniform(self) -> SubNetwork:
        """SWIFT's start (§4.1), as far as the space has it."""
        start = SubNetwork.uniform(self.n_layer)
        return SubNetwork(
            n_layer=self.n_layer,
            skip_attn=start.skip_attn & set(self.attn),
            skip_ffn=start.skip_ffn & set(self.ffn),
        )
