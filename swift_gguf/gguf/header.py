"""Reads and checks the header of a GGUF file: its metadata, and the table of its tensors.

gguf.GGUFReader takes seconds for a large vocabulary; this reader is faster.  Even for a damaged
file, it never needs more memory than a few times the file's size.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

from swift_gguf.errors import ModelError

# ggml type -> (weights per block, bytes per block); other types are unknown or were removed.
_TYPES: dict[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8),
    28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip
# GGUF value type -> struct format
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
U16, U32, F32, STRING, ARRAY = 2, 4, 6, 8, 9
_KEEP_ITEMS = 4096  # longer arrays of numbers belong to the vocabulary: only their length is kept
# Limits for items that take a few bytes in the file but hundreds in memory.  No real model comes
# near them.
_MAX_STRINGS = 1 << 21
_MAX_PAIRS = 1 << 12
_MAX_TENSORS = 1 << 16
_MAX_NAME = 63
_AGAIN = "the file is damaged: download or convert it again"


@dataclasses.dataclass(frozen=True)
class Array:
    """A metadata array: its items if it is a short array of numbers, otherwise only its length."""

    item_type: int
    length: int
    items: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]  # ggml's order: the row length first
    type: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        block, block_bytes = _TYPES[self.type]
        return self.size // block * block_bytes


@dataclasses.dataclass
class Header:
    """The part of a GGUF file before the weights."""

    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    types: dict[str, int] = dataclasses.field(default_factory=dict)
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    tokens: list[bytes] = dataclasses.field(default_factory=list)
    length: int = 0  # bytes, without the padding before the weights
    n_after: int = 0  # bytes after the last tensor and its padding

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """A hyperparameter of this architecture, without its prefix."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int = 0) -> int:
        """An integer hyperparameter; `default` for other types, which llama.cpp refuses itself."""
        value = self.get(key, default)
        return value if isinstance(value, int) else default

    def numbers(self, key: str) -> list[int]:
        """An integer hyperparameter that is given once, or for each layer."""
        value = self.get(key)
        if isinstance(value, Array):
            return [item for item in value.items if isinstance(item, int)]
        return [value] if isinstance(value, int) and not isinstance(value, bool) else []


class Problem(Exception):
    """An error message, without the file's name: what is wrong, and what to do."""

    def __init__(self, what: str, advice: str = _AGAIN) -> None:
        # names from a damaged file may have any characters and any length
        text = "".join(char if char.isprintable() else "?" for char in what)
        super().__init__(f"{text if len(text) < 200 else text[:200] + '...'}; {advice}")


class _Reader:
    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data = data
        self._size = len(data)
        self.at = 0

    def number(self, fmt: str) -> Any:
        (value,) = struct.unpack_from("<" + fmt, self._data, self.at)
        self.at += struct.calcsize(fmt)
        return value

    def raw(self, what: str) -> bytes:
        length = self.number("Q")
        if length > self._size - self.at:
            raise Problem(f"{what} is {length} bytes long, beyond the end of the file")
        self.at += length
        return self._data[self.at - length : self.at]

    def text(self, what: str) -> str:
        return self.raw(what).decode("utf-8", "replace")

    def value(self, kind: int, key: str, header: Header) -> Any:
        if kind == STRING:
            return self.text(f"the value of '{key}'")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != ARRAY:
            raise Problem(f"'{key}' has the unknown type {kind}")
        item_type, count = self.number("I"), self.number("Q")
        if item_type == STRING:
            self._strings(key, count, header)
            return Array(item_type, count)
        if item_type not in _SCALARS:
            raise Problem(f"'{key}' is an array of the unknown type {item_type}")
        size = struct.calcsize(_SCALARS[item_type])
        if count > (self._size - self.at) // size:
            raise Problem(f"'{key}' has {count} items, beyond the end of the file")
        items: tuple[Any, ...] = ()
        if count <= _KEEP_ITEMS:
            items = struct.unpack_from(f"<{count}{_SCALARS[item_type]}", self._data, self.at)
        self.at += count * size
        return Array(item_type, count, items)

    def _strings(self, key: str, count: int, header: Header) -> None:
        """Skips strings; keeps the vocabulary's.  A hot loop: 300,000 steps for a large one."""
        if count > (self._size - self.at) // 8:
            raise Problem(f"'{key}' has {count} strings, beyond the end of the file")
        if count > _MAX_STRINGS:
            raise Problem(f"'{key}' has {count} strings, more than {_MAX_STRINGS}")
        data, at, unpack = self._data, self.at, struct.Struct("<Q").unpack_from
        if key == "tokenizer.ggml.tokens":
            add = header.tokens.append
            for _ in range(count):
                (length,) = unpack(data, at)
                at += 8
                add(data[at : at + length])
                at += length
        else:
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
        if at > self._size:
            raise Problem(f"the strings of '{key}' reach beyond the end of the file")
        self.at = at


def _read_metadata(reader: _Reader, count: int, header: Header) -> None:
    for _ in range(count):
        key = reader.text("a metadata key")
        if not key or key in header.metadata:
            raise Problem(f"the metadata key '{key}' is empty or occurs twice")
        header.types[key] = reader.number("I")
        header.metadata[key] = reader.value(header.types[key], key, header)


def _read_tensors(reader: _Reader, count: int, header: Header, size: int) -> None:
    alignment = 32
    if "general.alignment" in header.metadata:
        alignment = header.metadata["general.alignment"]
        if header.types["general.alignment"] != U32 or alignment < 1 or alignment.bit_count() > 1:
            raise Problem(f"general.alignment is {alignment}, not a power of two")
    start = end = 0  # of the last tensor, end without padding
    for _ in range(count):
        raw = reader.raw("a tensor's name")
        name = raw.decode("utf-8", "replace")
        if len(raw) > _MAX_NAME or name in header.tensors:
            raise Problem(f"the tensor name '{name[:80]}' is too long or occurs twice")
        n_dims = reader.number("I")
        if n_dims > 4:
            raise Problem(f"tensor '{name}' has {n_dims} dimensions")
        shape = tuple(reader.number("q") for _ in range(n_dims)) or (1,)
        kind, offset = reader.number("I"), reader.number("Q")
        if min(shape) < 1:
            raise Problem(f"tensor '{name}' has the shape {list(shape)}")
        if kind not in _TYPES:
            raise Problem(
                f"tensor '{name}' has the type {kind}, which llama.cpp does not know",
                "the type may be too new or no longer supported: convert the model again",
            )
        block, block_bytes = _TYPES[kind]
        if shape[0] % block:
            raise Problem(f"tensor '{name}' has rows of {shape[0]}, not a multiple of {block}")
        start = end + -end % alignment
        if offset != start:
            raise Problem(f"tensor '{name}' is at offset {offset}, but {start} was expected")
        end = start + math.prod(shape) // block * block_bytes
        header.tensors[name] = Tensor(shape, kind)
    needed = reader.at + -reader.at % alignment + end
    if header.tensors and needed > size:
        raise Problem(
            f"the file has {size} bytes, but its tensors need {needed}",
            "it was cut short: download it again",
        )
    header.n_after = max(0, size - needed - -end % alignment)


def _read(data: mmap.mmap | bytes) -> Header:
    header, reader = Header(), _Reader(data)
    if data[:4] != b"GGUF":
        raise Problem("this is not a GGUF file", "name a .gguf file, or convert the model first")
    try:
        reader.at = 4
        version = reader.number("I")
        if version not in (2, 3):
            raise Problem(
                f"GGUF version {version} is not supported",
                "versions 2 and 3 are: convert the model again",
            )
        n_tensors, n_pairs = reader.number("q"), reader.number("q")
        for count, least, most, what in (
            (n_tensors, 24, _MAX_TENSORS, "tensors"),
            (n_pairs, 13, _MAX_PAIRS, "metadata keys"),
        ):
            if not 0 <= count <= len(data) // least:
                raise Problem(
                    f"it claims to have {count} {what}, more than fit into its {len(data)} bytes",
                    "it is damaged or was cut short: download it again",
                )
            if count > most:
                raise Problem(f"it has {count} {what}, more than {most}")
        _read_metadata(reader, n_pairs, header)
        _read_tensors(reader, n_tensors, header, len(data))
        header.length = reader.at
    except (struct.error, OverflowError):
        raise Problem(
            "the file ends in the middle of its header", "it was cut short: download it again"
        ) from None
    return header


def _map(path: Path) -> Header:
    if path.exists() and not path.is_file():
        raise OSError("not a regular file")  # opening a pipe would block
    with path.open("rb") as file:
        if file.seek(0, 2) < 24:  # mmap refuses empty files
            file.seek(0)
            return _read(file.read())
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(data)


def read(path: Path | str) -> Header:
    """The header of a GGUF file.

    Raises:
        ModelError: the file is not a valid GGUF, or cannot be read.
    """
    try:
        return _map(Path(path))
    except Problem as problem:
        raise ModelError(f"{path}: {problem}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path}: cannot be read ({reason}); check the path") from None
