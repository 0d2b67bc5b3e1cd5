"""The native functions for conversion: quantising files, and observing matrix products."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from swift_gguf.errors import ConvertError, NativeLibraryError
from swift_gguf.native.binding import Library, library
from swift_gguf.native.load import REINSTALL

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FTYPE = "LLAMA_FTYPE_MOSTLY_"
_TYPE = "GGML_TYPE_"
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""llama-quantize's aliases."""
NEED_IMATRIX = frozenset(
    {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}
)
"""llama.cpp refuses these without an importance matrix."""
_TENSORS_NEED_IMATRIX = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})
"""It also refuses tensors of these types without one."""
# Syntax of Python's regular expressions that ECMAScript's lack (llama.cpp uses std::regex): named
# groups, flags, look-behind, the anchors \A and \Z, and possessive quantifiers.
_NOT_ECMASCRIPT = re.compile(r"(?<!\\)(?:\\\\)*(\(\?(?![:=!])|\\[AZ]|[*+?}]\+)")
_ONLY_CONVERTED = frozenset({"NVFP4"})
"""Types of checkpoints that llama_model_quantize cannot write."""
# plain numbers, and blocks of activations
_NOT_FOR_WEIGHTS = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "COUNT"})
MAX_BUFFER = 512 << 20
"""Bytes of a tensor that quantisation keeps in memory; llama.cpp's default is 8 GiB."""


@cache
def file_types() -> Mapping[str, int]:
    """llama.cpp's names and values of all types that a model can be quantised to."""
    constants = vars(library().api)
    found = {
        name.removeprefix(_FTYPE): int(value)
        for name, value in constants.items()
        if name.startswith(_FTYPE) and name.removeprefix(_FTYPE) not in _ONLY_CONVERTED
    }
    return {"F32": int(constants["LLAMA_FTYPE_ALL_F32"]), **found}


@cache
def tensor_types() -> Mapping[str, int]:
    """Names and values of all types that a weight tensor can have."""
    constants = vars(library().api)
    names = {name.removeprefix(_TYPE): int(v) for name, v in constants.items() if _TYPE in name}
    return {name: value for name, value in names.items() if name not in _NOT_FOR_WEIGHTS}


def file_type(name: str) -> int:
    """
    Raises:
        ConvertError: there is no such type; the message lists those that there are.
    """
    wanted = name.upper()
    known = file_types()
    if (wanted := ALIASES.get(wanted, wanted)) not in known:
        raise ConvertError(f"there is no type {name!r:.40}; there are {', '.join(known)}")
    return known[wanted]


def tensor_type(name: str) -> int:
    """
    Raises:
        ConvertError: there is no such type; the message lists those that there are.
    """
    known = tensor_types()
    if name.upper() not in known:
        raise ConvertError(f"there is no type {name!r:.40} of tensors; use {', '.join(known)}")
    return known[name.upper()]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """The types to store a model's weights in; names as in `file_types` and `tensor_types`.

    Raises:
        ConvertError: there is no such type, or a pattern is not a regular expression.
    """

    name: str
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    """(regular expression, type); the first one that matches part of a tensor's name applies."""
    pure: bool = False
    """Use one type for all tensors; by default, llama.cpp gives some tensors more bits."""
    leave_output_tensor: bool = False

    def __post_init__(self) -> None:
        file_type(self.name)
        for name in (self.output_tensor_type, self.token_embedding_type):
            if name is not None:
                tensor_type(name)
        for pattern, name in self.overrides:
            tensor_type(name)
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConvertError(
                    f"{pattern!r:.60} is not a regular expression ({error})"
                ) from None
            if foreign := _NOT_ECMASCRIPT.search(pattern):
                raise ConvertError(
                    f"llama.cpp's patterns have ECMAScript's syntax; write {pattern!r:.60} "
                    f"without {foreign[1]!r}"
                )

    @property
    def needs_imatrix(self) -> str | None:
        """The first requested type that llama.cpp refuses without an importance matrix, or None."""
        if self.name.upper() in NEED_IMATRIX:
            return self.name
        types = (self.output_tensor_type, self.token_embedding_type)
        of_tensors = [*filter(None, types), *(name for _, name in self.overrides)]
        return next((name for name in of_tensors if name.upper() in _TENSORS_NEED_IMATRIX), None)


def quantize_file(
    source: Path,
    out: Path,
    quantization: Quantization,
    *,
    imatrix: Mapping[str, NDArray[np.float32]] | None = None,
    n_threads: int = 0,
) -> None:
    """Quantises the GGUF `source` to `out` (llama_model_quantize).

    `out` is incomplete until this returns.  It cannot be interrupted: run it in a process of its
    own.

    imatrix: for each tensor, the mean squares of the activations of its columns.

    Raises:
        ConvertError: llama.cpp refuses or fails; the message says why.
    """
    lib = library()
    api = lib.api
    params = api.llama_model_quantize_default_params()
    params.nthread = n_threads
    params.ftype = file_type(quantization.name)
    params.pure = quantization.pure
    params.quantize_output_tensor = not quantization.leave_output_tensor
    params.allow_requantize = True  # the user may choose a Q8_0 intermediate
    params.max_buf_size = MAX_BUFFER
    if quantization.output_tensor_type:
        params.output_tensor_type = tensor_type(quantization.output_tensor_type)
    if quantization.token_embedding_type:
        params.token_embedding_type = tensor_type(quantization.token_embedding_type)
    overrides = [(pattern.encode(), tensor_type(name)) for pattern, name in quantization.overrides]
    if overrides:
        params.tt_overrides = (api.llama_model_tensor_override * (len(overrides) + 1))(*overrides)
    entries = _imatrix_entries(api, imatrix or {})
    if entries is not None:
        params.imatrix = entries
    with lib.messages() as messages:
        code = api.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params))
    if code != 0:
        raise ConvertError(_reason(messages, quantization.name))


def _imatrix_entries(api: Any, imatrix: Mapping[str, NDArray[np.float32]]) -> Any:
    """An array that ends with an empty entry; `imatrix` must outlive it."""
    if not imatrix:
        return None
    floats = ctypes.POINTER(ctypes.c_float)
    rows = [
        (name.encode(), values.ctypes.data_as(floats), values.size)
        for name, values in imatrix.items()
    ]
    return (api.llama_model_imatrix_data * (len(rows) + 1))(*rows)


def _reason(messages: Sequence[str], name: str) -> str:
    text = next((line for line in reversed(messages) if "failed to quantize" in line), "")
    why = text.partition("failed to quantize:")[2].strip() or "llama.cpp does not say why"
    if "different from tensor size" in why:
        return f"the importance matrix is for another model ({why}); pass --imatrix auto"
    if "Missing importance matrix for" in why:
        return f"the importance matrix lacks a tensor ({why}); pass --imatrix auto"
    if "imatrix" in why:
        return f"{name} needs an importance matrix; pass --imatrix auto, or a file"
    if "iostream" in why or "basic_ios" in why:
        return "the quantised model cannot be written; is the disk full?"
    return f"the model cannot be quantised to {name}: {why}"


# -- matrix products -------------------------------------------------------------------------------


class _Tensor(ctypes.Structure):
    """struct ggml_tensor; `_base` compares its size with the library's."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]
_OBJECT_SIZE = 32  # struct ggml_object, which ggml_tensor_overhead() includes


class ProductObserver(Protocol):
    """A function that is called for every product of a weight with activations."""

    def __call__(
        self,
        weight: str,
        activations: NDArray[np.float32],
        experts: NDArray[np.int32] | None,
        n_expert: int,
        /,
    ) -> None:
        """
        activations: [n_tokens, n_used or 1, row length].
        experts: [n_tokens, n_used]; None if the weight has no experts.
        """
        ...


class ProductWatch:
    """An eval callback for a context (`ModelOptions.watch`); it must outlive the context.

    `failure` keeps an exception of the observer: it cannot pass through llama.cpp's frames.

    Raises:
        NativeLibraryError: the library's struct ggml_tensor differs from this module's.
    """

    def __init__(self, observer: ProductObserver) -> None:
        lib = library()
        self._observer = observer
        self._base = _base(lib)
        self.failure: BaseException | None = None
        self.callback = lib.api.ggml_backend_sched_eval_callback(self._on_node)

    def _on_node(self, address: int, ask: bool, _: object) -> bool:
        """Called with `ask` to learn if a node is wanted; then again when it is computed."""
        try:
            op = self._base.ggml_op_desc(address)
            if self.failure or op not in (b"MUL_MAT", b"MUL_MAT_ID"):
                return not ask
            node = _Tensor.from_address(address)
            weight, inputs = (source.contents for source in node.src[:2])
            name = weight.name.decode("utf-8", "replace")
            if inputs.type != 0 or not name.endswith(".weight"):  # 0: F32
                return not ask
            if not ask:
                values, ids = self._fetch(inputs, "f4"), None
                if op == b"MUL_MAT_ID":
                    ids = self._fetch(node.src[2].contents, "i4")[0, 0]
                    values = values[0]
                else:
                    values = values.reshape(-1, 1, values.shape[-1])
                self._observer(name, values, ids, int(weight.ne[2]))
        except BaseException as error:  # ctypes would drop it
            self.failure = error
        return True

    def _fetch(self, tensor: _Tensor, kind: str) -> Any:
        """A copy of a tensor of 4-byte numbers, with numpy's order of dimensions."""
        import numpy as np

        size = self._base.ggml_nbytes(ctypes.byref(tensor))
        raw = np.empty(size, np.uint8)
        self._base.ggml_backend_tensor_get(ctypes.byref(tensor), raw.ctypes.data, 0, size)
        return np.ndarray(tensor.ne[::-1], kind, raw, strides=tensor.nb[::-1])


@cache
def _base(lib: Library) -> ctypes.CDLL:
    """The library ggml-base with typed functions to read tensors."""
    base = lib._ggml("ggml-base")
    base.ggml_tensor_overhead.restype = ctypes.c_size_t
    if base.ggml_tensor_overhead() != ctypes.sizeof(_Tensor) + _OBJECT_SIZE:
        raise NativeLibraryError(
            f"struct ggml_tensor of the library in {lib.folder} has another size; {REINSTALL}"
        )
    base.ggml_op_desc.restype, base.ggml_op_desc.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    base.ggml_nbytes.restype, base.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    base.ggml_backend_tensor_get.restype = None
    base.ggml_backend_tensor_get.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2]
    return base
