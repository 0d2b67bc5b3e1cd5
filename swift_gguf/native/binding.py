"""The native library.  Only `binding`, `abi` and `convert` call it with ctypes.

The library is llama.cpp's libllama with our patch (see native/README.md).  `llama_cpp`, the ctypes
binding of llama-cpp-python, loads the same file, so both use one library.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_gguf.errors import (
    DecodeError,
    NativeLibraryError,
    NotFiniteError,
    SwiftError,
    UnsupportedModelError,
)
from swift_gguf.native.abi import (
    ABI,
    ERRORS,
    FLOATS,
    NOT_FINITE,
    ON_FFN,
    SIGNATURES,
    DraftParams,
    DraftRequest,
    SublayerStruct,
)
from swift_gguf.native.abi import SUBLAYER_STATUS as SUBLAYER_STATUS
from swift_gguf.native.abi import Cost as Cost
from swift_gguf.native.abi import FfnObserver as FfnObserver
from swift_gguf.native.abi import SidecarHandle as SidecarHandle
from swift_gguf.native.abi import StopFlag as StopFlag
from swift_gguf.native.abi import SubnetworkHandle as SubnetworkHandle
from swift_gguf.native.captured import captured_stderr
from swift_gguf.native.deep_stack import on_deep_stack
from swift_gguf.native.load import REINSTALL, find_library, import_llama_cpp
from swift_gguf.subnetwork import SubNetwork

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that ggml can compute on."""

    name: str
    description: str
    is_gpu: bool


class Library:
    """The loaded library: `api` is the `llama_cpp` module; the methods wrap swift_gguf.h.

    Contexts are passed as `llama_cpp` returns them (`llama_context_p`, an address).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.api = import_llama_cpp(folder)
        self._swift = self.api._lib
        self._check_versions()
        self._log: deque[str] = deque(maxlen=50)
        self._interrupted: KeyboardInterrupt | SystemExit | None = None
        self._catch_interrupts()
        self.show_log(False)
        self._callback = self.api.llama_log_callback(self._on_log)
        self.api.llama_log_set(self._callback, ctypes.c_void_p(0))
        self.api.llama_backend_init()

    # -- versions and messages ---------------------------------------------------------------------

    def _check_versions(self) -> None:
        for name, (result, arguments) in SIGNATURES.items():
            try:
                function = getattr(self._swift, name)
            except AttributeError:
                raise NativeLibraryError(
                    f"{self.folder} holds a libllama without swift-gguf's patch; {REINSTALL}"
                ) from None
            function.restype, function.argtypes = result, arguments
        if (abi := self._swift.swift_gguf_abi()) != ABI:
            raise NativeLibraryError(
                f"the library in {self.folder} has ABI {abi}, this package needs {ABI}; {REINSTALL}"
            )
        structs = {name: getattr(self.api, name) for name in _LLAMA_STRUCTS}
        structs |= {
            "swift_gguf_cost": Cost,
            "swift_gguf_sublayer": SublayerStruct,
            "swift_gguf_draft_params": DraftParams,
            "swift_gguf_draft_request": DraftRequest,
        }
        for name, struct in structs.items():
            native = self._swift.swift_gguf_struct_size(name.encode())
            if native != ctypes.sizeof(struct):
                bindings = version("llama-cpp-python")
                raise NativeLibraryError(
                    f"the library in {self.folder} and llama-cpp-python {bindings} "
                    f"disagree about {name} ({native} and {ctypes.sizeof(struct)} bytes); "
                    + REINSTALL
                )

    def _on_log(self, level: int, text: bytes, _: object) -> None:
        try:
            if level in (3, 4):  # GGML_LOG_LEVEL_WARN, _ERROR
                self._log.append(text.decode("utf-8", "replace").strip())
            if self._shows_log:
                sys.stderr.write(text.decode("utf-8", "replace"))
        except (KeyboardInterrupt, SystemExit) as ending:
            self._interrupted = ending  # ctypes drops what a callback raises

    def _catch_interrupts(self) -> None:
        """Keeps a Ctrl-C that arrives while llama.cpp computes.

        Python runs the signal's handler at the first line of the next callback, before any `try`.
        The exception then reaches only `sys.unraisablehook`.
        """
        others = sys.unraisablehook

        def hook(lost: sys.UnraisableHookArgs) -> None:
            is_ours = getattr(lost.object, "__module__", None) == __name__
            if is_ours and isinstance(lost.exc_value, (KeyboardInterrupt, SystemExit)):
                self._interrupted = lost.exc_value
            else:
                others(lost)

        sys.unraisablehook = hook

    def show_log(self, wanted: bool) -> None:
        """Shows or hides llama.cpp's log on standard error.  SWIFT_GGUF_LOG always shows it."""
        self._shows_log = wanted or bool(os.environ.get("SWIFT_GGUF_LOG"))

    @contextmanager
    def messages(self) -> Iterator[deque[str]]:
        """Collects the warnings and errors that llama.cpp logs inside the block, oldest first.

        If Ctrl-C arrives in one of llama.cpp's callbacks, KeyboardInterrupt is raised at the end of
        the block.
        """
        self._log.clear()
        try:
            yield self._log
        finally:  # also after an error, which the interrupt may have caused
            ending = self._interrupted
            if ending and threading.current_thread() is threading.main_thread():
                self._interrupted = None
                raise ending

    def unless_stopped(self, flag: StopFlag) -> Any:
        """A `progress_callback` for a model's parameters: stops loading on Ctrl-C or by the flag.

        Keep a reference as long as it may be called.
        """

        def goes_on(_progress: float, _: object) -> bool:
            return not (flag.is_up or self._interrupted)

        return self.api.llama_progress_callback(goes_on)

    @contextmanager
    def overriding(self, params: Any, values: Mapping[str, int]) -> Iterator[None]:
        """Inside the block, loading a model with `params` overrides these metadata values."""
        items = (self.api.llama_model_kv_override * (len(values) + 1))()  # the last one is empty
        for item, (key, value) in zip(items, values.items(), strict=False):
            item.tag = self.api.LLAMA_KV_OVERRIDE_TYPE_INT
            item.key, item.value.val_i64 = key.encode(), value
        params.kv_overrides = items if values else None
        yield
        params.kv_overrides = None

    @property
    def llama_commit(self) -> str:
        """The library's llama.cpp commit; "unknown" if built from the user's own checkout."""
        return str(self._swift.swift_gguf_llama_commit().decode())

    @cached_property
    def build(self) -> str:
        """Tells this build of the library, on this processor, from others: 32 hex digits."""
        digest = hashlib.sha256(self.api.llama_print_system_info())
        digest.update(f"{version('swift-gguf')} {self.llama_commit}".encode())
        for path in sorted(self.folder.iterdir()):
            if path.name.startswith(("lib", "llama", "ggml")) and path.is_file():
                status = path.stat()
                digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()[:32]

    def devices(self) -> list[Device]:
        """ggml's devices, GPUs first."""
        base, registry = self._ggml("ggml-base"), self._ggml("ggml")
        registry.ggml_backend_dev_count.restype = ctypes.c_size_t
        registry.ggml_backend_dev_get.restype = ctypes.c_void_p
        registry.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
        for name in ("name", "description"):
            getattr(base, f"ggml_backend_dev_{name}").restype = ctypes.c_char_p
            getattr(base, f"ggml_backend_dev_{name}").argtypes = [ctypes.c_void_p]
        base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
        pointers = [
            registry.ggml_backend_dev_get(i) for i in range(registry.ggml_backend_dev_count())
        ]
        found = [
            Device(
                name=base.ggml_backend_dev_name(pointer).decode(),
                description=base.ggml_backend_dev_description(pointer).decode(),
                is_gpu=base.ggml_backend_dev_type(pointer) in (1, 2),  # GPU, IGPU
            )
            for pointer in pointers
        ]
        return sorted(found, key=lambda device: not device.is_gpu)

    def _ggml(self, name: str) -> ctypes.CDLL:
        suffix = {"darwin": "lib{}.dylib", "win32": "{}.dll"}.get(sys.platform, "lib{}.so")
        return ctypes.CDLL(str(self.folder / suffix.format(name)))

    # -- swift_gguf.h ------------------------------------------------------------------------------

    def sidecar(self, model: Any, path: Path) -> SidecarHandle:
        """Loads a model's sidecar.

        Raises:
            SidecarError: it does not fit the model, or does not work on this machine.
        """
        with self.messages(), captured_stderr():
            return SidecarHandle(self._swift, model, path)

    def subnetwork(
        self, subnetwork: SubNetwork, sidecar: SidecarHandle | None = None
    ) -> SubnetworkHandle:
        """The native form of a sub-network."""
        return SubnetworkHandle(self._swift, subnetwork, sidecar)

    def set_subnetwork(self, ctx: Any, handle: SubnetworkHandle | None) -> None:
        """Sets the sub-network for the context's next forward passes; None is the whole model."""
        pointer = handle.pointer if handle else None
        _check(self._swift.swift_gguf_set_subnetwork(ctx, pointer), "set the sub-network")

    def rollback_refusal(self, ctx: Any) -> str | None:
        """Why this context cannot be rolled back exactly, or None if it can."""
        reason = self._swift.swift_gguf_rollback_refusal(ctx)
        return reason.decode() if reason else None

    def set_batch_invariant(self, ctx: Any, enable: bool) -> None:
        """Enables CPU kernels whose results do not depend on the batch size."""
        code = self._swift.swift_gguf_set_batch_invariant(ctx, enable)
        _check(code, "choose batch-invariant kernels")

    def has_kernels(self, ctx: Any) -> bool:
        """True if the batch-invariant mode serves prompts, too, with kernels of ours."""
        return bool(self._swift.swift_gguf_has_kernels(ctx))

    def machine_key(self, ctx: Any) -> str:
        """What costs depend on besides the model and the context length."""
        key = ctypes.create_string_buffer(256)
        _check(self._swift.swift_gguf_machine_key(ctx, key, len(key)), "name the machine")
        return key.value.decode()

    def pass_cost(
        self, ctx: Any, handle: SubnetworkHandle | None, *, n_tokens: int, n_outputs: int, n_kv: int
    ) -> Cost:
        """The cost of decoding `n_tokens` tokens with `n_kv` positions in the KV cache."""
        cost = Cost()
        pointer = handle.pointer if handle else None
        code = self._swift.swift_gguf_pass_cost(ctx, pointer, n_tokens, n_outputs, n_kv, cost)
        _check(code, "count the cost of a pass")
        return cost

    def sublayers(
        self, ctx: Any, n_layer: int
    ) -> tuple[Sequence[SublayerStruct], Sequence[SublayerStruct]]:
        """For each layer's attention and FFN: whether it can be skipped, and what that saves."""
        attention, ffn = (SublayerStruct * n_layer)(), (SublayerStruct * n_layer)()
        _check(
            self._swift.swift_gguf_sublayers(ctx, attention, ffn, n_layer), "look at the sub-layers"
        )
        return list(attention), list(ffn)

    @contextmanager
    def observe_ffn(
        self, ctx: Any, observer: FfnObserver, sidecar: SidecarHandle | None = None
    ) -> Iterator[None]:
        """Inside the block, every dense FFN of a pass calls the observer.

        The call is `observer(layer, inputs, activations, output)`.  The arrays are float32:
        [n_tokens, n_embd] (or [n_tokens, 0] if unknown), [n_tokens, n_ff] and [n_tokens, n_embd].
        They are valid during the call.  Narrow FFNs of the sidecar are observed, too.

        An exception of the observer is raised at the end of the block.
        """
        import numpy as np

        failed: list[BaseException] = []

        def on_ffn(
            _: Any, il: int, n: int, n_embd: int, inputs: Any, n_ff: int, activations: Any, out: Any
        ) -> None:
            if failed:
                return
            try:
                as_array = np.ctypeslib.as_array
                seen = as_array(inputs, (n, n_embd)) if inputs else np.zeros((n, 0), np.float32)
                observer(il, seen, as_array(activations, (n, n_ff)), as_array(out, (n, n_embd)))
            except BaseException as error:  # ctypes would drop it
                failed.append(error)

        callback = ON_FFN(on_ffn)
        pointer = self._swift.swift_gguf_observe_ffn(
            ctx, sidecar.pointer if sidecar else None, callback, None
        )
        if not pointer:
            raise UnsupportedModelError("this model has no dense FFN that can be observed")
        try:
            yield
        finally:
            self._swift.swift_gguf_observe_ffn_end(pointer)
        if failed:
            raise failed[0]

    def set_stop_flag(self, ctx: Any, flag: StopFlag) -> None:
        """Stops the context's forward passes while the flag is raised."""
        _check(self._swift.swift_gguf_set_stop_flag(ctx, flag.value), "watch the stop flag")

    def top(self, ctx: Any, row: int, k: int) -> tuple[list[int], list[float]]:
        """The k most likely tokens of an output row, and their probabilities at temperature 1."""
        tokens, probabilities = (ctypes.c_int32 * k)(), (ctypes.c_float * k)()
        n = self._swift.swift_gguf_top(ctx, row, k, tokens, probabilities)
        _check(n, "read the logits")
        return tokens[:n], probabilities[:n]

    def draft(
        self, ctx: Any, handle: SubnetworkHandle, token: int, pos: int, *, n_max: int, p_min: float
    ) -> tuple[list[int], list[float]]:
        """Greedy draft tokens after `token` at position `pos`, and their probabilities.

        This is the drafting loop for C programs; Python drafts trees (`swift_gguf.drafting.tree`).
        """
        tokens, probabilities = (ctypes.c_int32 * n_max)(), (ctypes.c_float * n_max)()
        params = DraftParams(0, n_max, p_min)
        n = self._swift.swift_gguf_draft(
            ctx, handle.pointer, params, token, pos, tokens, probabilities
        )
        _check(n, "draft")
        return tokens[:n], probabilities[:n]

    def logits(self, ctx: Any, row: int, n_vocab: int) -> Any:
        """A copy of an output row's logits, float32 [n_vocab]."""
        import numpy as np

        pointer = self.api.llama_get_logits_ith(ctx, row)
        if not pointer:
            raise DecodeError(f"output row {row} has no logits; request them when decoding")
        return np.ctypeslib.as_array(pointer, (n_vocab,)).copy()

    def candidates(self, chain: Any, logits: Any) -> tuple[Any, Any]:
        """Applies a sampler chain to a row of logits, float32 [n_vocab].

        Returns the remaining token ids, int32 [n], in any order, and their changed logits,
        float32 [n].
        """
        ids, logits, _ = self._applied(chain, logits)
        return ids.copy(), logits.copy()

    def draw(self, chain: Any, logits: Any) -> int | None:
        """Draws a token from a row of logits, float32 [n_vocab], and accepts it.

        Like llama_sampler_sample, but returns None if the chain leaves no token, which a grammar
        may cause: llama.cpp would draw a token anyway, and abort when it is accepted.
        """
        ids, logits, selected = self._applied(chain, logits)
        if not 0 <= selected < len(ids) or logits[selected] == -math.inf:
            return None
        token = int(ids[selected])
        self.api.llama_sampler_accept(chain, token)
        return token

    def _applied(self, chain: Any, logits: Any) -> tuple[Any, Any, int]:
        """Token ids and logits, valid until the chain's next use, and the selected index."""
        import numpy as np

        data = np.zeros(len(logits), np.dtype(self.api.llama_token_data))
        data["id"] = np.arange(len(logits))
        data["logit"] = logits
        pointer = data.ctypes.data_as(self.api.llama_token_data_p)
        array = self.api.llama_token_data_array(pointer, len(data), -1, False)
        self.api.llama_sampler_apply(chain, ctypes.byref(array))
        # a sampler may have replaced our buffer with its own
        left = np.ctypeslib.as_array(array.data, (array.size,))
        if left.ctypes.data == data.ctypes.data:
            left = data[: array.size]  # keeps the buffer alive
        return left["id"], left["logit"], int(array.selected)

    def quantize(self, rows: NDArray[np.float32], ggml_type: int) -> NDArray[np.uint8]:
        """Quantises rows of weights: uint8 [n_rows, bytes per row] (ggml_quantize_chunk)."""
        import numpy as np

        base = self._ggml("ggml-base")
        base.ggml_row_size.restype = ctypes.c_size_t
        base.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
        base.ggml_quantize_chunk.restype = ctypes.c_size_t
        base.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, FLOATS, ctypes.c_void_p, *[ctypes.c_int64] * 3, FLOATS,
        ]  # fmt: skip
        rows = np.ascontiguousarray(rows, np.float32)
        n_rows, n_per_row = rows.shape
        out = np.empty((n_rows, base.ggml_row_size(ggml_type, n_per_row)), np.uint8)
        base.ggml_quantize_chunk(
            ggml_type, rows.ctypes.data_as(FLOATS), out.ctypes.data, 0, n_rows, n_per_row, None
        )
        return out

    # -- text buffers that llama.cpp fills ---------------------------------------------------------

    def tokenize(
        self, vocab: Any, text: bytes, *, add_special: bool, parse_special: bool
    ) -> list[int]:
        """Token ids of UTF-8 text (llama_tokenize)."""

        def tokenized() -> list[int]:
            size = len(text) + 8
            for _ in range(2):
                buffer = (self.api.llama_token * size)()
                n = self.api.llama_tokenize(
                    vocab, text, len(text), buffer, size, add_special, parse_special
                )
                if n >= 0:
                    return list(buffer[:n])
                size = -n
            raise SwiftError(
                "llama.cpp could not tokenize the text; is the model's vocabulary intact?"
            )

        return on_deep_stack(self.stack_characters(vocab, text), tokenized)

    def stack_characters(self, vocab: Any, text: bytes) -> int:
        """How deep llama.cpp's regex may recurse on this text; 0 for vocabularies without one."""
        if self.api.llama_vocab_type(vocab) != self.api.LLAMA_VOCAB_TYPE_BPE:
            return 0
        return len(text.decode("utf-8", "replace"))

    def token_bytes(self, vocab: Any, token: int, *, special: bool) -> bytes:
        """A token's UTF-8 bytes (llama_token_to_piece); may be only a part of a character."""
        size = 64
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            n = self.api.llama_token_to_piece(vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n
        return b""

    def pieces(self, vocab: Any) -> tuple[list[bytes], list[int]]:
        """The `token_bytes` of each token, and the ids of all end-of-generation tokens."""
        to_piece, is_end = self.api.llama_token_to_piece, self.api.llama_vocab_is_eog
        size = 256
        buffer = ctypes.create_string_buffer(size)
        pieces = []
        n_vocab = self.api.llama_vocab_n_tokens(vocab)
        for token in range(n_vocab):
            n = to_piece(vocab, token, buffer, size, 0, False)
            whole = buffer.raw[:n] if n >= 0 else self.token_bytes(vocab, token, special=False)
            pieces.append(whole)
        return pieces, [token for token in range(n_vocab) if is_end(vocab, token)]

    def metadata(self, model: Any, key: str) -> str | None:
        """A value of the GGUF's metadata as text; None if there is none."""
        size = 256
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            n = self.api.llama_model_meta_val_str(model, key.encode(), buffer, size)
            if n < 0:
                return None
            if n < size:
                return buffer.value.decode("utf-8", "replace")
            size = n + 1
        return None

    def description(self, model: Any) -> str:
        """llama.cpp's description in one line: architecture, size and quantisation."""
        buffer = ctypes.create_string_buffer(256)
        self.api.llama_model_desc(model, buffer, 256)
        return buffer.value.decode("utf-8", "replace")


_LLAMA_STRUCTS = (
    "llama_model_params",
    "llama_context_params",
    "llama_batch",
    "llama_model_quantize_params",
    "llama_sampler_chain_params",
    "llama_token_data_array",
)


def buffer(n_bytes: int) -> Any:
    """A buffer that llama.cpp may write to."""
    return (ctypes.c_uint8 * n_bytes)()


def _check(code: int, what: str) -> None:
    if code >= 0:
        return
    if code == -2:
        raise UnsupportedModelError(f"could not {what}: {ERRORS[code]}; use --speculation off")
    kind = NotFiniteError if code == NOT_FINITE else DecodeError
    raise kind(f"could not {what}: {ERRORS.get(code, f'llama_decode returned {-100 - code}')}")


@cache
def library() -> Library:
    """The library; the first call loads and checks it.

    Raises:
        NativeLibraryError: it is missing, lacks our patch or has another version.
    """
    return Library(find_library())
