"""Text files that people name, read in one way whatever door they come in by.

Editors and shells of Windows begin UTF-8 with a byte order mark, which is no part of the text, and
write UTF-16, which is refused: without a mark it reads as text full of NULs.
"""

from __future__ import annotations

import codecs
import errno
import os
import stat
from pathlib import Path

from swift_gguf.errors import SwiftError

MAX_BYTES = 64 << 20
"""More than any file of text that is wanted here has."""
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
        SwiftError: it cannot be read, is longer, or is no UTF-8 text; the line names the file.
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
    r"""Text of bytes in UTF-8, without a byte order mark; line ends are ``\n``.

    name: what they are from, for the message.

    Raises:
        SwiftError: they are none, or more than `limit`.
    """
    if data.startswith(_UTF16):
        raise error(f"{name} is not UTF-8 text but UTF-16; save it as UTF-8")
    if b"\0" in data:
        raise error(
            f"{name} is not UTF-8 text: it holds NUL characters; if it is text, save it as UTF-8"
        )
    if len(data) > limit:
        raise error(f"{name} is too long: at most {limit >> 20} MiB are read; give a part of it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{name} is not UTF-8 text; save it as UTF-8") from cause
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(path: Path | str, *, limit: int, pipes: bool) -> bytes:
    """At most one byte more than `limit`."""
    # a pipe that nobody writes to would be waited for while it is opened
    descriptor = os.open(path, os.O_RDONLY | (0 if pipes else getattr(os, "O_NONBLOCK", 0)))
    with open(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not (stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode))):
            raise OSError(errno.EINVAL, "it is no regular file; name a file of text")
        return file.read(limit + 1)
