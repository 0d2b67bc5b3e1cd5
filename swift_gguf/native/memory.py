"""What the C library is told about memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

LARGE = 4 << 20
"""Bytes of a buffer that gets pages of its own; what sampling a token takes stays below."""
KEPT = 16 << 20
"""Bytes at the heap's end that are not given back at once."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def _libc(name: str) -> Callable[..., int] | None:
    """A function of glibc's; None elsewhere."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def give_back_large_buffers() -> None:
    """For processes that run for days: large buffers leave nothing behind when they are freed.

    glibc raises its limit for pages of their own to the largest buffer freed so far, up to 32 MB
    (mallopt(3)): states of conversations would come and go on the heap, and leave holes there.
    Other C libraries have no such call, and need none.
    """
    if mallopt := _libc("mallopt"):
        mallopt(_M_MMAP_THRESHOLD, LARGE)
        mallopt(_M_TRIM_THRESHOLD, KEPT)


def give_back_free_pages() -> None:
    """What lies free between buffers in use, where it fills pages; takes milliseconds.

    Requests that overlap leave holes of all sizes, more with every hour (malloc_trim(3)).
    """
    if trim := _libc("malloc_trim"):
        trim(0)
