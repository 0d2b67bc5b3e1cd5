"""Multiplies matrices and columns that end where memory ends; a process of its own: it may crash.

Prints each case before it runs.  Its argument: how many rows more than there are the product is
told of; 0, or more for the control.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import replace

import numpy as np
from gguf import GGMLQuantizationType as Type

from tests.native.products import Matrix, Products
from tests.native.test_products import CASES, random

PROT_NONE = 0
WIDTHS = (1, 3, 8, 16, 17, 130)
KEPT: list[mmap.mmap] = []


def at_the_end(n_bytes: int) -> int:
    """The address of so many bytes after which nothing can be read or written."""
    n = -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, n + mmap.PAGESIZE)
    KEPT.append(memory)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + n
    guard = ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE
    if ctypes.CDLL(None).mprotect(*guard) != 0:
        raise OSError("mprotect failed")
    return end - n_bytes


def check(kind: Type, *, is_repacked: bool, n_more: int) -> None:
    n_rows = 104 if is_repacked else 101
    matrix = Matrix.quantized(kind, random(n_rows, seed=1))
    columns = random(max(WIDTHS), seed=2)
    free = Products(matrix, is_repacked=is_repacked)
    told = replace(matrix, n_rows=n_rows + n_more)
    guarded = Products(told, is_repacked=is_repacked, place=at_the_end)
    for width in WIDTHS:
        expected = free.with_columns(columns[:width])
        np.testing.assert_array_equal(guarded.with_columns(columns[:width]), expected)
    guarded.close()
    free.close()


if __name__ == "__main__":
    for kind, is_repacked in CASES:
        if not is_repacked or Products.are_repacked(kind):
            print(kind.name, "repacked" if is_repacked else "", flush=True)
            check(kind, is_repacked=is_repacked, n_more=int(sys.argv[1]))
