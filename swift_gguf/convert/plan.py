"""What a conversion will write, and whether there is room for it."""

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
"""A vocabulary and all else that precedes the weights, at most in most models."""
SPARE_BYTES = 64 << 20
"""Left free on the disk."""
SIDECAR_SHARE = 0.25
"""Of a model's size, at most in most models."""
# Mixtures are named by the type that most of them is in; of these names that is none.
_MIXTURES = {"IQ2_M": "IQ2_S", "IQ3_M": "IQ3_S", "IQ3_XS": "IQ3_S", "MXFP4_MOE": "MXFP4"}
# Bits a weight of types that gguf-py may not know yet.
_NEWER = {"Q1_0": 1.125, "Q2_0": 2.25, "NVFP4": 4.5, "MXFP4": 4.25}
MIXED = 1.08
"""What mixtures are larger by than the type they are named by: some tensors get more bits."""


def bits(name: str) -> float:
    """Bits a weight of the type that a kind of file is named by, nearly."""
    kind = _MIXTURES.get(name, name)
    if kind not in GGMLQuantizationType.__members__:
        kind = re.sub(r"_[SML]$", "", kind)
    if kind in _NEWER:
        return _NEWER[kind]
    n_weights, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return float(8 * n_bytes / n_weights)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes that are written, nearly."""

    intermediate: int
    model: int
    """What is asked for; the intermediate itself where nothing is quantised."""
    sidecar: int
    folder: Path
    has_intermediate: bool = False
    """It is there from an earlier run."""
    has_model: bool = False
    """So is the model, which takes no intermediate then."""
    quantizes: bool = True
    copies: bool = False
    """The model is written once more, with keys added."""

    @property
    def needed(self) -> int:
        """Bytes that have to be free."""
        total = 0 if self.has_intermediate or self.has_model else self.intermediate
        if self.quantizes and not self.has_model:
            total += self.model
        copy = self.model if self.copies else 0  # gone before the sidecar is written
        return total + max(copy, self.sidecar) + SPARE_BYTES

    def require_space(self) -> None:
        """
        Raises:
            ConvertError: the disk has too little room.
        """
        free = shutil.disk_usage(self.folder).free
        if free < self.needed:
            raise ConvertError(
                f"this takes about {readable(self.needed)} in {self.folder}, where "
                f"{readable(free)} are free; free some space, or write elsewhere with -o"
            )


def expected_bytes(checkpoint: Checkpoint, kind: str) -> int:
    """Of a GGUF whose weights are of a type (`OUTTYPES`, or what a file is quantised to)."""
    each = bits(kind) / 8
    is_plain = kind in ("F32", "F16", "BF16", "Q8_0")
    if not checkpoint.tensors:
        return round(checkpoint.n_params * each * (1.0 if is_plain else MIXED)) + METADATA_BYTES
    head_each = each if is_plain else max(each, bits("Q6_K") / 8)  # as llama.cpp has it
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
    """12.3 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.{1 if n_bytes < 100 * size else 0}f} {unit}"
    return f"{n_bytes:.0f} bytes"
