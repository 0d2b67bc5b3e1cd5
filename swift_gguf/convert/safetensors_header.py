"""Files of safetensors, of which only the headers are read.

The layout is checked against the file's size, so that what was cut short in a download is found in
a moment, not by a converter at the end of an hour.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from swift_gguf.errors import ConvertError

AGAIN = "download it again"
MAX_HEADER = 100_000_000  # bytes; the limit of safetensors' own reader
# Bytes of an element.
DTYPES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8,
    "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Of a checkpoint, as its header has it."""

    shape: tuple[int, ...]
    dtype: str
    """In safetensors' words; ``?`` in a pickle, which is not read."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of safetensors.

    Raises:
        ConvertError: its header is damaged, or its size is another than the header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise _damaged(path, "it does not begin as safetensors do")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        rows = {name: row for name, row in header.items() if name != "__metadata__"}
        tensors, end = {}, 0
        for name, row in sorted(rows.items(), key=lambda item: item[1]["data_offsets"][0]):
            tensor = Tensor(shape=tuple(row["shape"]), dtype=row["dtype"])
            start, stop = row["data_offsets"]
            if min(tensor.shape, default=0) < 0 or start != end:
                raise _damaged(path, f"the tensor {name!r:.80} is not where it should be")
            if tensor.dtype in DTYPES and stop - start != tensor.size * DTYPES[tensor.dtype]:
                raise _damaged(path, f"the tensor {name!r:.80} is not as long as it should be")
            tensors[name], end = tensor, stop
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        raise _damaged(path, "its header cannot be read") from None
    if end != size - 8 - length:
        raise _damaged(path, f"it has {size} bytes where its tensors need {end + 8 + length}")
    return tensors


def _damaged(path: Path, why: str) -> ConvertError:
    return ConvertError(f"{path} is damaged or was cut short: {why}; {AGAIN}")
