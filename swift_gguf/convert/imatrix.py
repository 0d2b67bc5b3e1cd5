"""Importance matrices: how much each column of a weight matters when it is quantised.

The format is llama.cpp's: GGUF, or the older ``.dat`` format, which can be read but not written.
The values are llama.cpp's, too: for each column, the sum of squares of its activations.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter
from numpy.typing import NDArray

from swift_gguf.errors import ConvertError, ModelError
from swift_gguf.gguf import header as gguf_header

Floats = NDArray[np.float32]
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MOST_ENTRIES = 1 << 20
_CHUNK = 512
"""Tokens per chunk: llama.cpp divides counts by it when it shows them."""


@dataclass
class Usage:
    """The use of one weight's columns, for each expert (one, if the weight has no experts)."""

    sums: NDArray[np.float64]
    """[n_expert, row length]."""
    counts: NDArray[np.int64]
    """[n_expert]: the number of tokens seen."""

    @property
    def means(self) -> Floats:
        """Mean squares, [n_expert * row length]; 1 for an expert that saw no token."""
        seen = self.counts[:, None] > 0
        means = np.where(seen, self.sums / np.maximum(self.counts[:, None], 1), 1.0)
        return means.astype(np.float32).reshape(-1)


@dataclass
class Collector:
    """Sums up the activations of matrix products; a `native.convert.ProductObserver`."""

    usage: dict[str, Usage] = field(default_factory=dict)

    def __call__(
        self, weight: str, activations: Floats, experts: NDArray[np.int32] | None, n_expert: int, /
    ) -> None:
        known = self.usage.get(weight)
        if known is None:
            sums = np.zeros((n_expert, activations.shape[-1]))
            known = self.usage[weight] = Usage(sums, np.zeros(n_expert, np.int64))
        if experts is None:
            rows = activations.reshape(-1, activations.shape[-1])
            known.sums += np.einsum("ij,ij->j", rows, rows)
            known.counts += len(rows)
            return
        n_used = experts.shape[-1]
        rows = np.broadcast_to(activations, (len(activations), n_used, activations.shape[-1]))
        for expert in np.unique(experts):
            chosen = rows[experts == expert]
            known.sums[expert] += np.einsum("ij,ij->j", chosen, chosen)
            known.counts[expert] += len(chosen)

    def means(self) -> dict[str, Floats]:
        return {name: usage.means for name, usage in self.usage.items()}


def write(path: Path, usage: Mapping[str, Usage], *, text: str) -> None:
    """Writes an importance matrix in llama-imatrix's format, completely or not at all.

    text: describes the calibration data, for people.
    """
    part = path.with_name(path.name + ".part")
    writer = GGUFWriter(part, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text])
    most = max((int(use.counts.max()) for use in usage.values()), default=0)
    writer.add_uint32("imatrix.chunk_count", max(1, most // _CHUNK))
    writer.add_uint32("imatrix.chunk_size", _CHUNK)
    for name, use in sorted(usage.items()):
        writer.add_tensor(name + _SUMS, use.sums.astype(np.float32))
        writer.add_tensor(name + _COUNTS, use.counts.astype(np.float32)[:, None])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Floats]:
    """The mean squares of each weight, [n_expert * row length].

    Raises:
        ConvertError: the file is missing, or is not an importance matrix.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")  # reading a device may never end
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            means = _read_gguf(path) if data[:4] == b"GGUF" else _read_legacy(data)
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror or error}") from None
    except ModelError as error:
        raise ConvertError(str(error)) from None
    except (ValueError, KeyError, struct.error):
        means = {}
    if not means or not all(np.isfinite(values).all() for values in means.values()):
        raise ConvertError(
            f"{path} is not a valid importance matrix; pass --imatrix auto to make one"
        )
    return means


def _read_gguf(path: Path) -> dict[str, Floats]:
    gguf_header.read(path)  # refuses damaged files, which GGUFReader does not handle
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    means = {}
    for name, sums in tensors.items():
        if name.endswith(_SUMS):
            weight = name.removesuffix(_SUMS)
            counts = tensors[weight + _COUNTS].reshape(-1).astype(np.int64)
            rows = sums.reshape(len(counts), -1).astype(np.float64)
            means[weight] = Usage(rows, counts).means
    return means


def _read_legacy(data: mmap) -> dict[str, Floats]:
    """Reads entries of: name length, name, number of calls, number of sums, sums of means."""
    (n_entries,) = struct.unpack_from("<i", data)
    at, means = 4, {}
    if not 0 < n_entries < _MOST_ENTRIES:
        raise ValueError
    for _ in range(n_entries):
        (length,) = struct.unpack_from("<i", data, at)
        name = data[at + 4 : at + 4 + length].decode()
        calls, size = struct.unpack_from("<ii", data, at + 4 + length)
        at += 12 + length
        if min(length, size) < 1 or at + 4 * size > len(data):
            raise ValueError
        sums = np.frombuffer(data, "<f4", size, at)
        means[name] = np.asarray(sums / max(1, calls), np.float32)
        at += 4 * size
    return means
