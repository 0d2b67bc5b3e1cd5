"""swift_gguf.h for ctypes: structs, signatures, and owners of native objects."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from swift_gguf.errors import SidecarError, SwiftError
from swift_gguf.subnetwork import SubNetwork

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ABI = 6
"""SWIFT_GGUF_ABI of native/include/swift_gguf.h that this module is written for."""


class Cost(ctypes.Structure):
    """struct swift_gguf_cost: bytes that a forward pass reads, and the size of its graph."""

    weight_bytes: int
    head_bytes: int
    kv_bytes: int
    n_nodes: int
    n_splits: int
    _fields_ = (
        ("weight_bytes", ctypes.c_uint64),
        ("head_bytes", ctypes.c_uint64),
        ("kv_bytes", ctypes.c_uint64),
        ("n_nodes", ctypes.c_int32),
        ("n_splits", ctypes.c_int32),
    )


class SublayerStruct(ctypes.Structure):
    """struct swift_gguf_sublayer."""

    status: int
    n_nodes: int
    weight_bytes: int
    kv_bytes: int
    _fields_ = (
        ("status", ctypes.c_int32),
        ("n_nodes", ctypes.c_int32),
        ("weight_bytes", ctypes.c_uint64),
        ("kv_bytes", ctypes.c_uint64),
    )


class DraftRequest(ctypes.Structure):
    """struct swift_gguf_draft_request."""

    seq_id: int
    text: Any
    n_text: int
    pos: int
    n_max: int
    draft: Any
    n_draft: int
    _fields_ = (
        ("seq_id", ctypes.c_int32),
        ("text", ctypes.POINTER(ctypes.c_int32)),
        ("n_text", ctypes.c_int32),
        ("pos", ctypes.c_int32),
        ("n_max", ctypes.c_int32),
        ("draft", ctypes.POINTER(ctypes.c_int32)),
        ("n_draft", ctypes.c_int32),
    )


class DraftParams(ctypes.Structure):
    """struct swift_gguf_draft_params."""

    seq_id: int
    n_max: int
    p_min: float
    _fields_ = (
        ("seq_id", ctypes.c_int32),
        ("n_max", ctypes.c_int32),
        ("p_min", ctypes.c_float),
    )


SUBLAYER_STATUS = ("ok", "absent", "unshared", "useless")
"""enum swift_gguf_sublayer_status, by value."""

NOT_FINITE = -4
ERRORS = {
    -1: "an argument is out of range",
    -2: "the context cannot be rolled back",
    -3: "llama.cpp could not build the graph",
    NOT_FINITE: "the logits are not finite; the model's weights are damaged",
}

MASK = ctypes.POINTER(ctypes.c_uint8)
FLOATS = ctypes.POINTER(ctypes.c_float)
ON_FFN = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    *[ctypes.c_int32] * 3,
    FLOATS,
    ctypes.c_int32,
    FLOATS,
    FLOATS,
)
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "swift_gguf_abi": (ctypes.c_int32, []),
    "swift_gguf_llama_commit": (ctypes.c_char_p, []),
    "swift_gguf_struct_size": (ctypes.c_size_t, [ctypes.c_char_p]),
    "swift_gguf_sidecar_load": (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t],
    ),
    "swift_gguf_sidecar_free": (None, [ctypes.c_void_p]),
    "swift_gguf_sidecar_size": (ctypes.c_uint64, [ctypes.c_void_p]),
    "swift_gguf_observe_ffn": (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_void_p, ON_FFN, ctypes.c_void_p],
    ),
    "swift_gguf_observe_ffn_end": (None, [ctypes.c_void_p]),
    "swift_gguf_subnetwork_init": (
        ctypes.c_void_p,
        [MASK, FLOATS, ctypes.c_int32, ctypes.c_void_p, ctypes.c_bool],
    ),
    "swift_gguf_subnetwork_free": (None, [ctypes.c_void_p]),
    "swift_gguf_set_subnetwork": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_void_p]),
    "swift_gguf_rollback_refusal": (ctypes.c_char_p, [ctypes.c_void_p]),
    "swift_gguf_set_batch_invariant": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_bool]),
    "swift_gguf_has_kernels": (ctypes.c_bool, [ctypes.c_void_p]),
    "swift_gguf_machine_key": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t],
    ),
    "swift_gguf_pass_cost": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int32] * 3, ctypes.POINTER(Cost)],
    ),
    "swift_gguf_sublayers": (
        ctypes.c_int32,
        [ctypes.c_void_p, *[ctypes.POINTER(SublayerStruct)] * 2, ctypes.c_int32],
    ),
    "swift_gguf_set_stop_flag": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32)],
    ),
    "swift_gguf_top": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            *[ctypes.c_int32] * 2,
            ctypes.POINTER(ctypes.c_int32),
            ctypes.POINTER(ctypes.c_float),
        ],
    ),
    "swift_gguf_draft": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.POINTER(DraftParams),
            *[ctypes.c_int32] * 2,
            ctypes.POINTER(ctypes.c_int32),
            ctypes.POINTER(ctypes.c_float),
        ],
    ),
}


class FfnObserver(Protocol):
    """See `Library.observe_ffn`."""

    def __call__(
        self,
        layer: int,
        inputs: NDArray[np.float32],
        activations: NDArray[np.float32],
        output: NDArray[np.float32],
        /,
    ) -> None: ...


class SidecarHandle:
    """Owns a `struct swift_gguf_sidecar`."""

    def __init__(self, swift: ctypes.CDLL, model: Any, path: Path) -> None:
        error = ctypes.create_string_buffer(256)
        self._free = swift.swift_gguf_sidecar_free
        self.pointer: int | None = swift.swift_gguf_sidecar_load(
            model, os.fsencode(path), error, len(error)
        )
        if not self.pointer:
            reason = error.value.decode("utf-8", "replace")
            raise SidecarError(f"{path} cannot be used: {reason}; run swift-gguf prepare again")
        self.n_bytes = int(swift.swift_gguf_sidecar_size(self.pointer))

    def __del__(self) -> None:
        if pointer := getattr(self, "pointer", None):
            self._free(pointer)


class SubnetworkHandle:
    """Owns a `struct swift_gguf_subnetwork`."""

    def __init__(
        self, swift: ctypes.CDLL, subnetwork: SubNetwork, sidecar: SidecarHandle | None
    ) -> None:
        n_layer = subnetwork.n_layer
        self._free = swift.swift_gguf_subnetwork_free
        self.pointer: int | None = swift.swift_gguf_subnetwork_init(
            (ctypes.c_uint8 * n_layer)(*subnetwork.attn_mask),
            (ctypes.c_float * n_layer)(*subnetwork.ffn_shares),
            n_layer,
            sidecar.pointer if sidecar else None,
            subnetwork.draft_head,
        )
        if not self.pointer:
            raise SwiftError(f"a sub-network of {n_layer} layers is not possible")

    def __del__(self) -> None:
        if pointer := getattr(self, "pointer", None):
            self._free(pointer)


class StopFlag:
    """While it is raised, loading a model stops, and so do forward passes.

    Any thread may raise it.
    """

    def __init__(self) -> None:
        self.value = ctypes.c_int32(0)

    @property
    def is_up(self) -> bool:
        return bool(self.value.value)

    def raise_(self) -> None:
        self.value.value = 1

    def lower(self) -> None:
        self.value.value = 0
