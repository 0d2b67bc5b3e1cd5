"""Settings of glibc's allocator."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

LARGE = 4 << 20
"""Buffers of this many bytes or more get their own pages; those for sampling are smaller."""
KEPT = 16 << 20
"""Free bytes at the end of the heap that are not returned to the system at once."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def _libc(name: str) -> Callable[..., int] | None:
    """A function of glibc; None on other systems."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def give_back_large_buffers() -> None:
    """Makes large buffers return to the system when they are freed; for long-running processes.

    By default, glibc raises the size from which a buffer gets its own pages to the largest buffer
    freed so far, up to 32 MB (mallopt(3)).  The states of conversations would then be on the heap
    and leave holes there.  Other C libraries have no such call and do not need it.
    """
    if mallopt := _libc("mallopt"):
        mallopt(_M_MMAP_THRESHOLD, LARGE)
        mallopt(_M_TRIM_THRESHOLD, KEPT)


def give_back_free_pages() -> None:
    """Returns free pages inside the heap to the system (malloc_trim(3)); takes milliseconds.

    Overlapping requests leave more and more holes in the heap.
    """
    if trim := _libc("malloc_trim"):
        trim(0)
