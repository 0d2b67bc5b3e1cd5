"""Reads a model's weights row by row, and writes a sidecar's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from numpy.typing import NDArray

from swift_gguf.errors import ModelError
from swift_gguf.gguf import sidecar
from swift_gguf.native import library

BLOCK = 256  # weights in a block of the k-quants
KindOf = Callable[[int], GGMLQuantizationType]
"""Maps a row length to the type of the draft weights."""


def bytes_each(kind: GGMLQuantizationType) -> float:
    """Bytes per weight."""
    n_block, n_bytes = GGML_QUANT_SIZES[kind]
    return float(n_bytes / n_block)


class Weights:
    """The memory-mapped tensors of a GGUF."""

    def __init__(self, path: Path) -> None:
        try:
            self._tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        except (ValueError, KeyError, IndexError) as error:  # in keys that llama.cpp ignores
            raise ModelError(
                f"{path}: its metadata cannot be read ({error}); download or convert it again"
            ) from error

    def has(self, name: str) -> bool:
        return name in self._tensors

    def kind(self, name: str) -> GGMLQuantizationType:
        """The type of the stored tensor."""
        return self._tensors[name].tensor_type

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in numpy's order: rows first."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def rows(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Some rows as stored: uint8 [n, bytes per row], or [n, length] of a plain type."""
        return np.ascontiguousarray(self._tensors[name].data[rows])

    def values(self, name: str, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """All rows, or some, dequantised to float32."""
        data = self._tensors[name].data
        stored = data if rows is None else data[rows]
        return np.asarray(dequantize(stored, self.kind(name)), np.float32)


def _stored(rows: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[Any]:
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        plain = np.float32 if kind == GGMLQuantizationType.F32 else np.float16
        return np.ascontiguousarray(rows, plain)
    return library().quantize(rows, kind.value)


def as_stored(rows: NDArray[np.float32], *, kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """The rows [n, length] after quantising and dequantising them."""
    return np.asarray(dequantize(_stored(rows, kind), kind), np.float32)


class Sidecar:
    """Collects the tensors of a sidecar; `finish` writes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: list[tuple[str, NDArray[Any], GGMLQuantizationType | None]] = []

    def add_rows(
        self,
        name: str,
        source: Weights,
        rows: NDArray[np.int64],
        kind: GGMLQuantizationType,
        *,
        of: str | None = None,
        more: NDArray[np.float32] | None = None,
    ) -> None:
        """Adds rows of the matrix `of` (default: `name`), followed by `more`.

        Rows that already have the type `kind` are copied without loss.
        """
        of = of or name
        if source.kind(of) == kind:
            stored = source.rows(of, rows)
        else:
            stored = _stored(source.values(of, rows), kind)
        if more is not None and len(more):
            stored = np.concatenate([stored, _stored(more, kind)])
        self._tensors.append((name, stored, kind))

    def add_values(self, name: str, rows: NDArray[np.float32], kind: GGMLQuantizationType) -> None:
        """Adds a float matrix, quantised to `kind`."""
        self._tensors.append((name, _stored(rows, kind), kind))

    def add_array(self, name: str, values: NDArray[Any]) -> None:
        """Adds a bias, or numbers that are not weights, in numpy's type."""
        self._tensors.append((name, values, None))

    @property
    def n_bytes(self) -> int:
        return sum(data.nbytes for _, data, _ in self._tensors)

    def finish(self, model: Path, n_narrow: Sequence[int], n_head: int) -> None:
        """Writes the file, completely or not at all."""
        part = self.path.with_name(self.path.name + ".part")
        writer = GGUFWriter(part, sidecar.ARCHITECTURE)
        writer.add_type("swift-sidecar")
        writer.add_name(f"{model.stem}: draft weights")
        writer.add_uint32("swift.version", sidecar.VERSION)
        for key, value in sidecar.identity(model).items():
            writer.add_string(key, value)
        writer.add_array("swift.n_narrow", list(n_narrow))
        writer.add_uint32("swift.n_head", n_head)
        for name, data, kind in self._tensors:
            writer.add_tensor(name, data, raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)
