"""Large buffers are given back when they are freed, by what the C library itself counts."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from swift_gguf.native_memory import LARGE

# what glibc has mapped for a large buffer, after a larger one has come and gone
PROBE = f"""
import ctypes, sys
from swift_gguf.native_memory import give_back_large_buffers

class Counts(ctypes.Structure):  # struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Counts
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "given back":
    give_back_large_buffers()
libc.free(libc.malloc(30 << 20))
before = libc.mallinfo2().hblkhd
libc.malloc({2 * LARGE})
print(libc.mallinfo2().hblkhd - before)
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc"
)


def mapped(case: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, case], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_a_large_buffer_has_pages_of_its_own() -> None:
    assert mapped("given back") >= 2 * LARGE


def test_otherwise_it_would_lie_on_the_heap() -> None:
    assert mapped("as glibc comes") == 0
