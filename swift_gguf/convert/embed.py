"""Adds keys to a GGUF's metadata; copies the rest byte by byte.

The key ``swift.profile`` holds what was learned about the model (`profile.portable`), so that the
first run starts with it.  llama.cpp ignores keys that it does not know.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

from swift_gguf.errors import ConvertError
from swift_gguf.gguf import header as gguf_header

_STRING = 8
_ALIGNMENT = 32


def embed(source: Path, out: Path, keys: Mapping[str, str]) -> None:
    """Copies `source` to `out` with more keys.  `out` is incomplete until this returns.

    Raises:
        ModelError: `source` is not a valid GGUF.
        ConvertError: it already has one of the keys.
    """
    header = gguf_header.read(source)
    if doubled := sorted(set(keys) & set(header.metadata)):
        raise ConvertError(f"{source} already has the key {doubled[0]}; convert it again")
    alignment = int(header.metadata.get("general.alignment", _ALIGNMENT))
    with source.open("rb") as file, out.open("wb") as target:
        fixed = bytearray(file.read(24))  # magic, version, numbers of tensors and of keys
        (n_keys,) = struct.unpack_from("<Q", fixed, 16)
        struct.pack_into("<Q", fixed, 16, n_keys + len(keys))
        target.write(fixed)
        # the new keys go first: the end of the old keys is not known without parsing all values
        for key, value in keys.items():
            target.write(_pair(key, value))
        target.write(file.read(header.length - 24))
        target.write(bytes(-target.tell() % alignment))
        file.seek(header.length + -header.length % alignment)
        shutil.copyfileobj(file, target, 16 << 20)
        target.flush()
        os.fsync(target.fileno())


def _pair(key: str, value: str) -> bytes:
    name, text = key.encode(), value.encode()
    return b"".join(
        (struct.pack("<Q", len(name)), name, struct.pack("<IQ", _STRING, len(text)), text)
    )
