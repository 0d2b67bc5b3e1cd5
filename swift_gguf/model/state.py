"""The state of a context in a file: its tokens, and their keys and values to the bit.

llama.cpp's own readers abort on some damaged states.  So llama.cpp sees only what was written by
the same build of the library for the same model: a file begins with what its state depends on, and
a checksum follows each part.  docs/formats.md describes the format.
"""

from __future__ import annotations

import hashlib
import json
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from swift_gguf.errors import StateError
from swift_gguf.gguf.identity import profile_key, weights_digest
from swift_gguf.model.loading import ModelOptions
from swift_gguf.native import buffer, library

MAGIC = b"swift-gguf state 1\n"
MAX_HEADER = 1 << 20
_NUMBER = struct.Struct("<Q")


def identity(
    path: Path, options: ModelOptions, *, n_ctx: int, sidecar: Path | None
) -> dict[str, Any]:
    """What the state of a context depends on, besides its tokens; JSON.

    path, sidecar: of the model and of its draft weights.
    """
    return {
        "model": profile_key(path, sidecar),
        "weights": weights_digest(path),
        "changed": path.stat().st_mtime_ns,
        "library": library().build,
        "n_ctx": n_ctx,
        "n_gpu_layers": options.n_gpu_layers,
        "flash_attn": options.flash_attn,
        "exact_kv": options.exact_kv,
    }


# -- writing ---------------------------------------------------------------------------------------


def write(
    file: BinaryIO,
    identity: Mapping[str, Any],
    tokens: Sequence[int],
    pieces: Iterable[tuple[int, Any]],
    *,
    notes: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> int:
    """Writes a state.  Returns its size in bytes.

    pieces: what `Cells.states` yields.
    notes: JSON; `read` returns them.
    limit: of the size, in bytes.

    Raises:
        StateError: the state is larger than the limit.
        OSError: the file cannot be written.
    """
    out = _Writer(file, limit)
    header = {**identity, "n_tokens": len(tokens), "notes": dict(notes or {})}
    out.put(MAGIC)
    out.part(json.dumps(header).encode())
    out.part(array("i", tokens).tobytes())
    for end, piece in pieces:
        out.put(_NUMBER.pack(end))
        out.part(piece)
    return out.n_bytes


class _Writer:
    def __init__(self, file: BinaryIO, limit: int | None) -> None:
        self._file, self._limit = file, limit
        self._digest = hashlib.sha256()
        self.n_bytes = 0

    def part(self, content: Any) -> None:
        """A part has its size before it, and after it a checksum of the file so far."""
        self.put(_NUMBER.pack(len(content)))
        self.put(content)
        self.put(self._digest.digest())

    def put(self, content: Any) -> None:
        self.n_bytes += len(content)
        if self._limit is not None and self.n_bytes > self._limit:
            raise StateError(f"the state is larger than {self._limit >> 20} MiB")
        self._file.write(content)
        self._digest.update(content)


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A state in a file, whose header is read."""

    tokens: list[int]
    notes: Mapping[str, Any]
    pieces: Iterator[tuple[int, Any]]
    """What `Cells.states` yielded.  Raises StateError if the file is damaged."""


def read(file: BinaryIO, identity: Mapping[str, Any]) -> Saved:
    """Reads a state.  Its pieces are read while they are iterated.

    Raises:
        StateError: the file is damaged, or its state depends on something else than `identity`.
        OSError: the file cannot be read.
    """
    source = _Reader(file)
    if bytes(source.take(len(MAGIC))) != MAGIC:
        raise StateError("it is not a state of this version")
    header = json.loads(bytes(source.part(MAX_HEADER)))
    n_tokens, notes = header.pop("n_tokens"), header.pop("notes")
    if header != identity:
        names = sorted(name for name in identity if header.get(name) != identity[name])
        raise StateError(f"another {', '.join(names)}")
    tokens = array("i", bytes(source.part()))
    if len(tokens) != n_tokens:
        raise StateError("tokens are missing")
    return Saved(tokens.tolist(), notes, _pieces(source, n_tokens))


def _pieces(source: _Reader, n_tokens: int) -> Iterator[tuple[int, Any]]:
    end = 0
    while end < n_tokens:
        end = source.number()
        yield end, source.part()
    if source.n_left:
        raise StateError("it goes on after its end")


class _Reader:
    """Reads what `_Writer` wrote."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.n_left = file.seek(0, 2)
        file.seek(0)
        self._digest = hashlib.sha256()

    def part(self, n_max: int | None = None) -> Any:
        """The content of a part, whose checksum is right.

        n_max: bytes.
        """
        n_bytes = self.number()
        if n_max is not None and n_bytes > n_max:
            raise StateError(f"a part of {n_bytes} bytes is too long")
        content = self.take(n_bytes)
        expected = self._digest.digest()
        if bytes(self.take(len(expected))) != expected:
            raise StateError("a checksum is wrong")
        return content

    def number(self) -> int:
        """A number that the checksum of the next part is for, too."""
        return int(_NUMBER.unpack(self.take(_NUMBER.size))[0])

    def take(self, n_bytes: int) -> Any:
        if n_bytes > self.n_left:
            raise StateError("its end is missing")
        content = buffer(n_bytes)
        if self._file.readinto(content) != n_bytes:  # type: ignore[attr-defined]
            raise StateError("its end is missing")
        self.n_left -= n_bytes
        self._digest.update(content)
        return content
