"""`SubNetwork`: the sub-layers that a draft pass skips or runs with fewer neurons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from swift_gguf.errors import SubnetworkError


@dataclass(frozen=True, kw_only=True)
class SubNetwork:
    """A sub-network of a model with `n_layer` layers: all sub-layers except the skipped ones.

    Raises:
        SubnetworkError: a layer outside [0, n_layer), or an FFN both skipped and narrow.
    """

    n_layer: int
    skip_attn: frozenset[int] = field(default_factory=frozenset)
    skip_ffn: frozenset[int] = field(default_factory=frozenset)
    narrow_ffn: frozenset[int] = field(default_factory=frozenset)
    """FFNs that run with the sidecar's neurons only; in a mixture of experts, half the experts."""
    draft_head: bool = False
    """Compute logits only for the tokens of the sidecar's head."""

    def __post_init__(self) -> None:
        for layer in self.skip_attn | self.skip_ffn | self.narrow_ffn:
            if not 0 <= layer < self.n_layer:
                raise SubnetworkError(
                    f"layer {layer} does not exist; the model has layers 0 to {self.n_layer - 1}"
                )
        if both := self.skip_ffn & self.narrow_ffn:
            raise SubnetworkError(f"FFN {format_layers(both)} cannot be both skipped and narrow")

    def __str__(self) -> str:
        skipped = {"attention": self.skip_attn, "FFN": self.skip_ffn}
        named = [f"{kind} {format_layers(layers)}" for kind, layers in skipped.items() if layers]
        parts = [f"without {' and '.join(named)}"] if named else []
        if self.narrow_ffn:
            parts.append(f"narrow FFN {format_layers(self.narrow_ffn)}")
        if self.draft_head:
            parts.append("the draft head")
        return ", ".join(parts) or "the whole model"

    @property
    def is_whole(self) -> bool:
        """True if nothing is skipped or narrow: this is the model itself."""
        return not (self.skip_attn or self.skip_ffn or self.narrow_ffn or self.draft_head)

    @property
    def attn_mask(self) -> list[bool]:
        """[n_layer], True where attention is skipped."""
        return [layer in self.skip_attn for layer in range(self.n_layer)]

    @property
    def ffn_shares(self) -> list[float]:
        """[n_layer], share of each FFN that runs: 0.0 skipped, 0.5 narrow, 1.0 whole."""
        return [
            0.0 if layer in self.skip_ffn else 0.5 if layer in self.narrow_ffn else 1.0
            for layer in range(self.n_layer)
        ]

    @classmethod
    def uniform(cls, n_layer: int) -> SubNetwork:
        """SWIFT's start (§4.1): every second layer is skipped, except the first and the last."""
        skip = frozenset(range(1, n_layer - 1, 2))
        return cls(n_layer=n_layer, skip_attn=skip, skip_ffn=skip)


def parse_layers(text: str) -> frozenset[int]:
    """Parses a list of layers and ranges, as in ``3,5-9``.

    Raises:
        SubnetworkError: the text has another form.
    """
    layers: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            raise SubnetworkError(f"{part!r} is not a layer; write layers as in 3,5-9") from None
        if high < low:
            raise SubnetworkError(f"the range {part!r} runs backwards; write {high}-{low}")
        if high > 10_000:  # so that a typing error does not use gigabytes
            raise SubnetworkError(f"there is no layer {high}")
        layers.update(range(low, high + 1))
    return frozenset(layers)


def format_layers(layers: Iterable[int]) -> str:
    """The inverse of `parse_layers`: ``3,5-9``."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ranges)
