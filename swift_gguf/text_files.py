"""Reads text files that users name.

Windows editors and shells may begin UTF-8 with a byte order mark, which is removed.  They may also
write UTF-16, which is rejected; without a byte order mark it is recognised by its NUL characters.
"""

from __future__ import annotations

import codecs
import errno
import os
import stat
from pathlib import Path

from swift_gguf.errors import SwiftError

MAX_BYTES = 64 << 20
"""Maximum size of a text file; none that is needed here comes near it."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(
    path: Path | str,
    *,
    limit: int = MAX_BYTES,
    pipes: bool = True,
    error: type[SwiftError] = SwiftError,
) -> str:
    r"""The text of a file in UTF-8; line ends are ``\n``.

    limit: bytes; no more is read.
    pipes: read a pipe (``<(command)``) to its end, too; devices are never read.
    error: what to raise.

    Raises:
        SwiftError: the file cannot be read, is too long, or is not UTF-8.
    """
    try:
        data = _read_bytes(path, limit=limit, pipes=pipes)
    except (OSError, ValueError) as cause:
        reason = (isinstance(cause, OSError) and cause.strerror) or cause
        raise error(f"{path} cannot be read: {reason}") from cause
    return decode(data, str(path), limit=limit, error=error)


def decode(
    data: bytes, name: str, *, limit: int = MAX_BYTES, error: type[SwiftError] = SwiftError
) -> str:
    r"""Decodes UTF-8 and removes a byte order mark; line ends become ``\n``.

    name: the source of the bytes, for error messages.

    Raises:
        SwiftError: they are not UTF-8 text, or more than `limit` bytes.
    """
    if data.startswith(_UTF16):
        raise error(f"{name} is not UTF-8 text but UTF-16; save it as UTF-8")
    if b"\0" in data:
        raise error(
            f"{name} is not UTF-8 text: it has NUL characters; if it is text, save it as UTF-8"
        )
    if len(data) > limit:
        raise error(f"{name} is too long: the limit is {limit >> 20} MiB; give a part of it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{name} is not UTF-8 text; save it as UTF-8") from cause
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(path: Path | str, *, limit: int, pipes: bool) -> bytes:
    """At most one byte more than `limit`."""
    # without O_NONBLOCK, opening a pipe blocks until somebody writes to it
    descriptor = os.open(path, os.O_RDONLY | (0 if pipes else getattr(os, "O_NONBLOCK", 0)))
    with open(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not (stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode))):
            raise OSError(errno.EINVAL, "it is not a regular file; name a text file")
        return file.read(limit + 1)
