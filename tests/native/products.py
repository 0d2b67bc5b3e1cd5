"""Single products of ggml's, computed by the library's CPU backend."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from swift_gguf.native import library

Floats = NDArray[np.float32]


class InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Ggml:
    """ggml's functions, which all take and return pointers where nothing else is said."""

    def __init__(self) -> None:
        folder = library().folder
        self._libraries = [
            ctypes.CDLL(str(next(folder.glob(f"lib{name}.*"))))
            for name in ("ggml-base", "ggml-cpu")
        ]

    def __getattr__(self, name: str) -> Any:
        for each in self._libraries:
            if hasattr(each, name):
                function = getattr(each, name)
                function.restype = ctypes.c_void_p
                setattr(self, name, function)
                return function
        raise AttributeError(name)

    def move(self, tensor: ctypes.c_void_p, n_bytes: int, place: Callable[[int], int]) -> None:
        """Moves a tensor's data to where `place` has room for so many bytes."""
        data, to = self.ggml_get_data(tensor), place(n_bytes)
        ctypes.memmove(to, data, n_bytes)
        words = (ctypes.c_void_p * 42).from_address(tensor.value or 0)  # struct ggml_tensor
        words[list(words).index(data)] = to

    @contextmanager
    def context(self) -> Iterator[ctypes.c_void_p]:
        made = ctypes.c_void_p(self.ggml_init(InitParams(1 << 20, None, True)))
        try:
            yield made
        finally:
            self.ggml_free(made)


@dataclass(frozen=True)
class Matrix:
    """Quantised weights: [n_rows, n] of one type."""

    type: GGMLQuantizationType
    n_rows: int
    n: int
    data: bytes

    @classmethod
    def quantized(cls, kind: GGMLQuantizationType, weights: Floats) -> Matrix:
        """By ggml's own quantisation."""
        ggml, (n_rows, n) = Ggml(), weights.shape
        ggml.ggml_row_size.restype = ctypes.c_size_t
        size = n_rows * ggml.ggml_row_size(int(kind), ctypes.c_int64(n))
        data = ctypes.create_string_buffer(size)
        ggml.ggml_quantize_chunk(
            int(kind),
            np.ascontiguousarray(weights).ctypes.data_as(ctypes.c_void_p),
            data,
            ctypes.c_int64(0),
            ctypes.c_int64(n_rows),
            ctypes.c_int64(n),
            None,
        )
        return cls(kind, n_rows, n, data.raw)


class Products:
    """Products of one matrix with any number of columns.

    is_repacked: in ggml's memory type whose rows are interleaved, if it has one for the matrix.
    is_ours: by our kernels.
    place: makes room for so many bytes, for the matrix, columns and results; None: ggml does.
    """

    def __init__(
        self,
        matrix: Matrix,
        *,
        is_repacked: bool = False,
        is_ours: bool = True,
        n_threads: int = 1,
        place: Callable[[int], int] | None = None,
    ) -> None:
        self._ggml = ggml = Ggml()
        self._place = place
        self._matrix = matrix
        self._backend = ctypes.c_void_p(ggml.ggml_backend_cpu_init())
        ggml.ggml_backend_cpu_set_n_threads(self._backend, n_threads)
        self._is_ours = is_ours
        self._context = ctypes.c_void_p(ggml.ggml_init(InitParams(1 << 16, None, True)))
        sizes = ctypes.c_int64(matrix.n), ctypes.c_int64(matrix.n_rows)
        self._weights = ctypes.c_void_p(
            ggml.ggml_new_tensor_2d(self._context, int(matrix.type), *sizes)
        )
        kind = self._repacking() if is_repacked else None
        self._buffer = ctypes.c_void_p(
            ggml.ggml_backend_alloc_ctx_tensors_from_buft(self._context, kind)
            if kind
            else ggml.ggml_backend_alloc_ctx_tensors(self._context, self._backend)
        )
        ggml.ggml_backend_tensor_set(
            self._weights, matrix.data, ctypes.c_size_t(0), ctypes.c_size_t(len(matrix.data))
        )
        if place:
            ggml.move(self._weights, len(matrix.data), place)

    def _repacking(self) -> ctypes.c_void_p:
        ggml = self._ggml
        device = ctypes.c_void_p(ggml.ggml_backend_get_device(self._backend))
        registry = ctypes.c_void_p(ggml.ggml_backend_dev_backend_reg(device))
        found = ggml.ggml_backend_reg_get_proc_address(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(found)(device)
        ggml.ggml_backend_buft_name.restype = ctypes.c_char_p
        for i in range(8):
            if not extra[i]:
                break
            kind = ctypes.c_void_p(extra[i])
            if b"REPACK" in ggml.ggml_backend_buft_name(kind):
                return kind
        raise LookupError("ggml repacks nothing here")

    @staticmethod
    def are_repacked(kind: GGMLQuantizationType) -> bool:
        """Does ggml repack this type here?  It has Q2_K for AVX-512 only."""
        return kind != GGMLQuantizationType.Q2_K or bool(Ggml().ggml_cpu_has_avx512())

    def with_columns(self, columns: Floats) -> Floats:
        """[n_columns, n] -> [n_columns, n_rows]."""
        ggml, n_columns = self._ggml, len(columns)
        ggml.ggml_backend_cpu_set_use_ref(self._backend, self._is_ours)
        columns = np.ascontiguousarray(columns)
        out = np.empty((n_columns, self._matrix.n_rows), np.float32)
        with ggml.context() as context:
            sizes = ctypes.c_int64(self._matrix.n), ctypes.c_int64(n_columns)
            x = ctypes.c_void_p(ggml.ggml_new_tensor_2d(context, 0, *sizes))
            y = ctypes.c_void_p(ggml.ggml_mul_mat(context, self._weights, x))
            graph = ctypes.c_void_p(ggml.ggml_new_graph(context))
            ggml.ggml_build_forward_expand(graph, y)
            buffer = ctypes.c_void_p(ggml.ggml_backend_alloc_ctx_tensors(context, self._backend))
            if self._place:
                ggml.move(x, columns.nbytes, self._place)
                ggml.move(y, out.nbytes, self._place)
            everything = ctypes.c_size_t(0), ctypes.c_size_t(columns.nbytes)
            ggml.ggml_backend_tensor_set(x, columns.ctypes.data_as(ctypes.c_void_p), *everything)
            ggml.ggml_backend_graph_compute(self._backend, graph)
            everything = ctypes.c_size_t(0), ctypes.c_size_t(out.nbytes)
            ggml.ggml_backend_tensor_get(y, out.ctypes.data_as(ctypes.c_void_p), *everything)
            ggml.ggml_backend_buffer_free(buffer)
        return out

    def close(self) -> None:
        """Frees the matrix."""
        self._ggml.ggml_backend_buffer_free(self._buffer)
        self._ggml.ggml_free(self._context)
        self._ggml.ggml_backend_free(self._backend)
