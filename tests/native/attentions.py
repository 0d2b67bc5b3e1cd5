"""Single attentions of ggml's (GGML_OP_FLASH_ATTN_EXT), computed by the library's CPU backend."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from tests.native.products import Floats, Ggml, InitParams, Matrix


@dataclass(frozen=True)
class Attention:
    """Queries, the cells of a KV cache, and what a token may read of them.

    queries: [token, head, dimension].
    keys, values: [cell, group, dimension], stored in the types `kinds`.
    mask: [token, cell], added to scores; -inf: the token does not read the cell.
    sinks: [head], or None.
    """

    queries: Floats
    keys: Floats
    values: Floats
    mask: Floats | None
    kinds: tuple[Type, Type] = (Type.F16, Type.F16)
    max_bias: float = 0.0
    softcap: float = 0.0
    sinks: Floats | None = None

    @classmethod
    def random(
        cls,
        *,
        n_tokens: int = 1,
        n_cells: int = 100,
        n_heads: int = 6,
        n_groups: int = 2,
        n: int = 64,
        n_values: int | None = None,
        seed: int = 0,
        **fields: Any,
    ) -> Attention:
        """The last tokens of a text that fills all cells."""
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> Floats:
            return rng.standard_normal(shape).astype(np.float32)

        seen = np.arange(n_cells)[None] <= np.arange(n_cells - n_tokens, n_cells)[:, None]
        return cls(
            normal(n_tokens, n_heads, n),
            normal(n_cells, n_groups, n),
            normal(n_cells, n_groups, n_values or n),
            np.where(seen, 0, -np.inf).astype(np.float32),
            **fields,
        )

    def tokens(self, rows: slice | NDArray[np.intp]) -> Attention:
        """Of these tokens only."""
        assert self.mask is not None
        return replace(self, queries=self.queries[rows], mask=self.mask[rows])

    def spread(self, places: NDArray[np.intp], n_cells: int, fill: float) -> Attention:
        """Cell i at place places[i] of `n_cells`; the others are masked and hold `fill`."""
        assert self.mask is not None
        keys = np.full((n_cells, *self.keys.shape[1:]), fill, np.float32)
        values = np.full((n_cells, *self.values.shape[1:]), fill, np.float32)
        mask = np.full((len(self.mask), n_cells), -np.inf, np.float32)
        keys[places], values[places], mask[:, places] = self.keys, self.values, self.mask
        return replace(self, keys=keys, values=values, mask=mask)

    def compute(self, *, n_threads: int = 1, is_ours: bool = True) -> Floats:
        """[token, head, dimension], by our kernels or llama.cpp's."""
        ggml = Ggml()
        backend = ctypes.c_void_p(ggml.ggml_backend_cpu_init())
        ggml.ggml_backend_cpu_set_n_threads(backend, n_threads)
        ggml.ggml_backend_cpu_set_use_ref(backend, is_ours)
        n_tokens, n_heads, n = self.queries.shape
        n_values = self.values.shape[2]
        context = ctypes.c_void_p(ggml.ggml_init(InitParams(1 << 20, None, True)))
        filled: list[tuple[ctypes.c_void_p, bytes]] = []

        def tensor(kind: Type, shape: tuple[int, ...], data: bytes) -> ctypes.c_void_p:
            sizes = (ctypes.c_int64 * 4)(*reversed(shape), *[1] * (4 - len(shape)))
            made = ctypes.c_void_p(ggml.ggml_new_tensor(context, int(kind), 4, sizes))
            filled.append((made, data))
            return made

        def in_cache(kind: Type, x: Floats) -> ctypes.c_void_p:
            made = tensor(kind, x.shape, stored(kind, x))  # cells lie beside each other
            return ctypes.c_void_p(ggml.ggml_permute(context, made, 0, 2, 1, 3))

        q = np.ascontiguousarray(self.queries.transpose(1, 0, 2))
        mask = None
        if self.mask is not None:
            halves = self.mask.astype(np.float16)
            mask = tensor(Type.F16, halves.shape, halves.tobytes())
        result = ctypes.c_void_p(
            ggml.ggml_flash_attn_ext(
                context,
                tensor(Type.F32, q.shape, q.tobytes()),
                in_cache(self.kinds[0], self.keys),
                in_cache(self.kinds[1], self.values),
                mask,
                ctypes.c_float(n**-0.5),
                ctypes.c_float(self.max_bias),
                ctypes.c_float(self.softcap),
            )
        )
        if self.sinks is not None:
            sinks = tensor(Type.F32, self.sinks.shape, self.sinks.tobytes())
            ggml.ggml_flash_attn_ext_add_sinks(result, sinks)
        graph = ctypes.c_void_p(ggml.ggml_new_graph(context))
        ggml.ggml_build_forward_expand(graph, result)
        buffer = ctypes.c_void_p(ggml.ggml_backend_alloc_ctx_tensors(context, backend))
        for made, data in filled:
            size = ctypes.c_size_t(0), ctypes.c_size_t(len(data))
            ggml.ggml_backend_tensor_set(made, data, *size)
        assert ggml.ggml_backend_graph_compute(backend, graph) in (0, None)
        out = np.empty((n_tokens, n_heads, n_values), np.float32)
        size = ctypes.c_size_t(0), ctypes.c_size_t(out.nbytes)
        ggml.ggml_backend_tensor_get(result, out.ctypes.data_as(ctypes.c_void_p), *size)
        ggml.ggml_backend_buffer_free(buffer)
        ggml.ggml_free(context)
        ggml.ggml_backend_free(backend)
        return out


def stored(kind: Type, x: Floats) -> bytes:
    """In a type of the cache."""
    if kind == Type.F32:
        return x.tobytes()
    if kind == Type.F16:
        return x.astype(np.float16).tobytes()
    if kind == Type.BF16:
        return (x.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return Matrix.quantized(kind, x.reshape(-1, x.shape[-1])).data
