"""The sub-layers that may be skipped, and sub-networks as vectors over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swift_gguf.errors import SubnetworkError
from swift_gguf.subnetwork import SubNetwork


@dataclass(frozen=True)
class Space:
    """The sub-layers that a search may skip: attention and FFN of some layers.

    The first and the last layer are always kept, as in SWIFT (§4.1).

    is_narrow: FFNs are not skipped but narrowed to the part in the model's sidecar.  This includes
        the first and the last one.

    Raises:
        SubnetworkError: the model does not have a layer, or no sub-layer may be skipped.
    """

    n_layer: int
    attn: Sequence[int]
    ffn: Sequence[int]
    is_narrow: bool = False
    has_head: bool = False
    """True if the sidecar has a draft head.  Every sub-network then uses it."""

    def __post_init__(self) -> None:
        SubNetwork(n_layer=self.n_layer, skip_attn=frozenset([*self.attn, *self.ffn]))
        ends = {0, self.n_layer - 1}
        object.__setattr__(self, "attn", tuple(sorted(set(self.attn) - ends)))
        ffn = set(self.ffn) if self.is_narrow else set(self.ffn) - ends
        object.__setattr__(self, "ffn", tuple(sorted(ffn)))
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
        return self._of(
            np.array(self.attn, dtype=int)[attn].tolist(),
            np.array(self.ffn, dtype=int)[ffn].tolist(),
        )

    def _of(self, attn: Iterable[int], ffn: Iterable[int]) -> SubNetwork:
        skip_attn, less_ffn = frozenset(attn), frozenset(ffn)
        if self.is_narrow:
            return SubNetwork(
                n_layer=self.n_layer,
                skip_attn=skip_attn,
                narrow_ffn=less_ffn,
                draft_head=self.has_head,
            )
        return SubNetwork(n_layer=self.n_layer, skip_attn=skip_attn, skip_ffn=less_ffn)

    def _less(self, subnetwork: SubNetwork) -> frozenset[int]:
        return subnetwork.narrow_ffn if self.is_narrow else subnetwork.skip_ffn

    def mask(self, subnetwork: SubNetwork) -> NDArray[np.bool_]:
        """The inverse of `subnetwork`: [size]."""
        flags = [layer in subnetwork.skip_attn for layer in self.attn]
        flags += [layer in self._less(subnetwork) for layer in self.ffn]
        return np.array(flags)

    def __contains__(self, subnetwork: SubNetwork) -> bool:
        attn, ffn = subnetwork.skip_attn, self._less(subnetwork)
        is_inside = subnetwork.n_layer == self.n_layer and attn <= set(self.attn)
        return is_inside and ffn <= set(self.ffn) and subnetwork == self._of(attn, ffn)

    def singles(self) -> list[SubNetwork]:
        """The sub-networks that skip one sub-layer each: [size]."""
        return [self.subnetwork(row) for row in np.eye(self.size, dtype=bool)]

    def random(self, rng: np.random.Generator, n_skip: int) -> SubNetwork:
        """A sub-network that skips `n_skip` random sub-layers."""
        skip = np.zeros(self.size, dtype=bool)
        skip[rng.choice(self.size, min(n_skip, self.size), replace=False)] = True
        return self.subnetwork(skip)

    def every(self, *, attn: int = 0, ffn: int = 0) -> SubNetwork:
        """A sub-network that skips every `attn`-th attention and every `ffn`-th FFN; 0: none."""
        return self._of(
            self.attn[attn // 2 :: attn] if attn else (), self.ffn[ffn // 2 :: ffn] if ffn else ()
        )

    def uniform(self) -> SubNetwork:
        """SWIFT's start (§4.1), as far as it is in the space."""
        start = SubNetwork.uniform(self.n_layer)
        return self._of(start.skip_attn & set(self.attn), start.skip_ffn & set(self.ffn))
