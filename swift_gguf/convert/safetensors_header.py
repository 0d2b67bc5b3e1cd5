"""Reads the headers of safetensors files.

The layout is checked against the file's size.  So an incomplete download is found at once, not
after an hour of conversion.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from swift_gguf.errors import ConvertError

AGAIN = "download it again"
MAX_HEADER = 100_000_000  # bytes; the limit of safetensors' own reader
# Bytes per element.
DTYPES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8,
    "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    """safetensors' name of the type."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ConvertError: its header is damaged, or does not match the file's size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise _damaged(path, "it does not begin like a safetensors file")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        rows = {name: row for name, row in header.items() if name != "__metadata__"}
        tensors, end = {}, 0
        for name, row in sorted(rows.items(), key=lambda item: item[1]["data_offsets"][0]):
            tensor = Tensor(shape=tuple(row["shape"]), dtype=row["dtype"])
            start, stop = row["data_offsets"]
            if min(tensor.shape, default=0) < 0 or start != end:
                raise _damaged(path, f"the tensor {name!r:.80} is at the wrong offset")
            if tensor.dtype in DTYPES and stop - start != tensor.size * DTYPES[tensor.dtype]:
                raise _damaged(path, f"the tensor {name!r:.80} has the wrong size")
            tensors[name], end = tensor, stop
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        raise _damaged(path, "its header cannot be read") from None
    if end != size - 8 - length:
        raise _damaged(path, f"it has {size} bytes, but its tensors need {end + 8 + length}")
    return tensors


def _damaged(path: Path, why: str) -> ConvertError:
    return ConvertError(f"{path} is damaged or was cut short: {why}; {AGAIN}")
