"""Products with any number of columns: the same bits however many there are."""

from __future__ import annotations

import ctypes
import platform
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants

from tests.conftest import N_GPU_LAYERS
from tests.native.products import Floats, Ggml, Matrix, Products

PLAIN = [
    Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.IQ4_NL, Type.MXFP4,
    Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_XS,
]  # fmt: skip
FLOATS = [Type.F32, Type.F16, Type.BF16]
REPACKED = [Type.Q4_0, Type.IQ4_NL, Type.MXFP4, Type.Q2_K, Type.Q4_K]
CASES = [(kind, False) for kind in PLAIN + FLOATS] + [(kind, True) for kind in REPACKED]
N = 512
MOST = 512
WIDTHS = (
    1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 71, 72, 73, 77, 81, 127, 128, 129,
    199, 255, 256, 257, 300, 511,
)  # fmt: skip
"""Tiles of columns are up to 8 wide, blocks of them 64."""

pytestmark = pytest.mark.skipif(
    N_GPU_LAYERS != 0 or platform.machine() not in ("x86_64", "AMD64"),
    reason="a property of the kernels for x86 with AVX2",
)


@pytest.fixture(autouse=True)
def _has_repacking(request: pytest.FixtureRequest) -> None:
    arguments = getattr(request.node, "callspec", None)
    if arguments and arguments.params.get("is_repacked"):
        kind = arguments.params["kind"]
        if not Products.are_repacked(kind):
            pytest.skip(f"ggml does not repack {kind.name} on this processor")


def random(n_rows: int, seed: int) -> Floats:
    return np.random.default_rng(seed).uniform(-1, 1, (n_rows, N)).astype(np.float32)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(("kind", "is_repacked"), CASES)
def test_every_width_has_the_same_bits(kind: Type, is_repacked: bool, n_threads: int) -> None:
    """Rows that fill no panel are among them; repacked ones come by eights."""
    n_rows = 104 if is_repacked else 101
    matrix = Matrix.quantized(kind, random(n_rows, seed=1))
    products = Products(matrix, is_repacked=is_repacked, n_threads=n_threads)
    columns = random(MOST, seed=2)
    everything = products.with_columns(columns)
    for width in WIDTHS:
        some = products.with_columns(columns[:width])
        np.testing.assert_array_equal(some, everything[:width], err_msg=f"width {width}")
    products.close()


@pytest.mark.parametrize(("kind", "is_repacked"), CASES)
def test_they_are_what_single_columns_give_but_for_rounding(kind: Type, is_repacked: bool) -> None:
    matrix = Matrix.quantized(kind, random(104, seed=3))
    products = Products(matrix, is_repacked=is_repacked)
    columns = random(73, seed=4)
    together = products.with_columns(columns)
    alone = np.concatenate([products.with_columns(columns[i : i + 1]) for i in range(73)])
    assert np.abs(together - alone).max() < 1e-5 * np.abs(alone).max()
    if is_repacked and kind in (Type.Q4_0, Type.Q4_K):  # rows have lanes of their own there, too
        np.testing.assert_array_equal(together, alone)
    products.close()


def test_the_arithmetic_is_the_one_written_down() -> None:
    """Whole numbers within a block; then sum = fma(scale * scale, number, sum), block by block."""
    matrix = Matrix.quantized(Type.Q8_0, random(32, seed=5))
    products = Products(matrix)
    columns = random(80, seed=6)
    together = products.with_columns(columns)
    products.close()

    rows = np.frombuffer(matrix.data, np.uint8).reshape(32, N // 32, 34)
    scales = rows[:, :, :2].copy().view(np.float16)[:, :, 0].astype(np.float32)
    codes = rows[:, :, 2:].view(np.int8).astype(np.int64)
    quantized = quants.quantize(columns, Type.Q8_0).reshape(80, N // 32, 34)
    column_scales = quantized[:, :, :2].copy().view(np.float16)[:, :, 0].astype(np.float32)
    column_codes = quantized[:, :, 2:].copy().view(np.int8).astype(np.int64)
    sums = np.zeros((80, 32), np.float32)
    for b in range(N // 32):
        numbers = column_codes[:, b] @ codes[:, b].T
        factors = (column_scales[:, b][:, None] * scales[:, b][None]).astype(np.float64)
        sums = (sums.astype(np.float64) + factors * numbers).astype(np.float32)
    np.testing.assert_array_equal(together, sums)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has to be asked for tiles")
def test_tiles_are_asked_for_where_the_processor_has_them() -> None:
    """Then Linux notes that this process may use them."""
    products = Products(Matrix.quantized(Type.Q8_0, random(32, seed=11)))
    products.with_columns(random(16, seed=12))
    products.close()
    may_use = ctypes.c_uint64()
    arch_prctl, get_permissions, tile_data = 158, 0x1022, 18
    if ctypes.CDLL(None).syscall(arch_prctl, get_permissions, ctypes.byref(may_use)) != 0:
        pytest.skip("this Linux knows no tiles")
    has_tiles = "amx_int8" in Path("/proc/cpuinfo").read_text()
    has_vnni = bool(Ggml().ggml_cpu_has_avx512_vnni())  # the library: it may be built for others
    assert bool(may_use.value >> tile_data & 1) == (has_tiles and has_vnni)


@pytest.mark.parametrize("n_more", [0, 1])
def test_nothing_is_read_or_written_beyond_the_end(n_more: int) -> None:
    """Memory ends after the matrix, the columns and the results.  One row more is the control."""
    command = [sys.executable, "-m", "tests.native.guarded", str(n_more)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == (-signal.SIGSEGV if n_more else 0), done.stdout[-200:] + done.stderr


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    """Where columns are quantised by us; ggml's Q8_0 makes a number of NaN."""
    columns = random(80, seed=9)
    columns[5, 300] = value
    products = Products(Matrix.quantized(Type.Q4_K, random(64, seed=10)))
    together = products.with_columns(columns)
    products.close()
    assert not np.isfinite(together[5]).any()
    assert np.isfinite(np.delete(together, 5, axis=0)).all()


def test_ggmls_own_are_others() -> None:
    """The control: without our kernels the bits are not these."""
    matrix = Matrix.quantized(Type.Q8_0, random(64, seed=7))
    columns = random(80, seed=8)
    ours, theirs = Products(matrix), Products(matrix, is_ours=False)
    a, b = ours.with_columns(columns), theirs.with_columns(columns)
    ours.close()
    theirs.close()
    assert (a != b).any()
    np.testing.assert_allclose(a, b, atol=1e-4)
