"""How many bytes a conversion writes, and whether the disk has room for them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from swift_gguf.convert.checkpoint import Checkpoint
from swift_gguf.errors import ConvertError

OUTTYPES: Mapping[str, str] = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
METADATA_BYTES = 8 << 20
"""For the vocabulary and the rest of the header; more than most models need."""
SPARE_BYTES = 64 << 20
"""To leave free on the disk."""
SIDECAR_SHARE = 0.25
"""A sidecar's size relative to the model's; more than most models need."""
# Most mixtures are named after their main type (Q4_K_M: Q4_K).  These are not.
_MIXTURES = {"IQ2_M": "IQ2_S", "IQ3_M": "IQ3_S", "IQ3_XS": "IQ3_S", "MXFP4_MOE": "MXFP4"}
# Bits per weight of types that gguf-py may not know yet.
_NEWER = {"Q1_0": 1.125, "Q2_0": 2.25, "NVFP4": 4.5, "MXFP4": 4.25}
MIXED = 1.08
"""A mixture's size relative to its main type's: some tensors get more bits."""


def bits(name: str) -> float:
    """Approximate bits per weight of a file type's main tensor type."""
    kind = _MIXTURES.get(name, name)
    if kind not in GGMLQuantizationType.__members__:
        kind = re.sub(r"_[SML]$", "", kind)
    if kind in _NEWER:
        return _NEWER[kind]
    n_weights, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return float(8 * n_bytes / n_weights)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Approximate sizes, in bytes, of the files that a conversion writes."""

    intermediate: int
    model: int
    """The final file; it is the intermediate itself if nothing is quantised."""
    sidecar: int
    folder: Path
    has_intermediate: bool = False
    """The intermediate exists from an earlier run."""
    has_model: bool = False
    """The model exists from an earlier run; then no intermediate is needed."""
    quantizes: bool = True
    copies: bool = False
    """The model is copied once more, to add keys."""

    @property
    def needed(self) -> int:
        """Bytes that must be free on the disk."""
        total = 0 if self.has_intermediate or self.has_model else self.intermediate
        if self.quantizes and not self.has_model:
            total += self.model
        copy = self.model if self.copies else 0  # deleted before the sidecar is written
        return total + max(copy, self.sidecar) + SPARE_BYTES

    def require_space(self) -> None:
        """
        Raises:
            ConvertError: the disk has too little space.
        """
        free = shutil.disk_usage(self.folder).free
        if free < self.needed:
            raise ConvertError(
                f"this needs about {readable(self.needed)} in {self.folder}, but only "
                f"{readable(free)} are free; free some space, or write elsewhere with -o"
            )


def expected_bytes(checkpoint: Checkpoint, kind: str) -> int:
    """Approximate size of a GGUF of the file type `kind`."""
    each = bits(kind) / 8
    is_plain = kind in ("F32", "F16", "BF16", "Q8_0")
    if not checkpoint.tensors:
        return round(checkpoint.n_params * each * (1.0 if is_plain else MIXED)) + METADATA_BYTES
    head_each = each if is_plain else max(each, bits("Q6_K") / 8)  # as llama.cpp does
    total = float(METADATA_BYTES)
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) < 2:
            total += 4 * tensor.size
        elif name.endswith("lm_head.weight") or (
            checkpoint.ties_embeddings and name.endswith("embed_tokens.weight")
        ):
            total += head_each * tensor.size
        else:
            total += each * (1.0 if is_plain else MIXED) * tensor.size
    return round(total)


def readable(n_bytes: float) -> str:
    """A size such as "12.3 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.{1 if n_bytes < 100 * size else 0}f} {unit}"
    return f"{n_bytes:.0f} bytes"
