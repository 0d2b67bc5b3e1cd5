"""Large buffers are given back when they are freed, by what the C library itself counts."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from swift_gguf.native.memory import LARGE

# what glibc has mapped for a large buffer, after a larger one has come and gone
PROBE = f"""
import ctypes, sys
from swift_gguf.native.memory import give_back_large_buffers

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

# bytes of this process that are in memory, with holes between buffers before and after
HOLES = """
import ctypes, re
from pathlib import Path
from swift_gguf.native.memory import give_back_free_pages

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
buffers = [libc.malloc(50_000) for _ in range(1000)]
for buffer in buffers:
    ctypes.memset(buffer, 1, 50_000)
for buffer in buffers[::2]:
    libc.free(buffer)
before = resident()
give_back_free_pages()
print(before - resident())
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc"
)


def test_holes_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 10 << 20


def mapped(case: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, case], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_a_large_buffer_has_pages_of_its_own() -> None:
    assert mapped("given back") >= 2 * LARGE


def test_otherwise_it_would_lie_on_the_heap() -> None:
    assert mapped("as glibc comes") == 0
