"""llama.cpp's model and context: made as speculation needs them, and freed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from swift_gguf.errors import ModelError, StoppedError, UnsupportedModelError
from swift_gguf.gguf.check import check
from swift_gguf.gguf.context_length import context_length
from swift_gguf.gguf.end_token import overrides
from swift_gguf.model.cells import N_SEQUENCES
from swift_gguf.native import StopFlag, library
from swift_gguf.native.threads import default_threads

if TYPE_CHECKING:
    from swift_gguf.native.convert import ProductWatch


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How to load a model; names follow llama.cpp's command line."""

    n_ctx: int | None = None
    """Context size in tokens; None: 4096, or as long as the model was trained for, if that is less;
    0: as long as it was trained for.  Never longer than a table of learned positions."""
    holds_several: bool = False
    """Several texts lie in the context beside one another, each shorter than it."""
    n_batch: int = 512
    """Tokens decoded at once during prefill; at least 48, so that trees and windows fit, too."""
    n_threads: int | None = None
    """None: see `threads.default_threads`."""
    n_gpu_layers: int = -1
    """-1: all of them, where there is a GPU."""
    flash_attn: bool | None = None
    """None: where the backend has it.  Texts with it may be others than without."""
    sidecar: Path | Literal["auto"] | None = "auto"
    """Weights for draft passes; ``auto``: those beside the model, if they are there and its own."""
    exact_kv: bool = False
    """Keys and values in 32 bits, where llama.cpp rounds them to 16: to compare, not to be fast."""
    watch: ProductWatch | None = None
    """Sees every product of a weight that a pass computes; slow."""


@dataclass
class Loaded:
    """A model of llama.cpp's and a context of it."""

    model: Any
    ctx: Any
    n_threads: int
    n_ctx: int = 0
    """Tokens it can hold: not all of llama.cpp's where the model has fewer positions."""
    is_ours: bool = True
    """Freed by `close`; otherwise by whoever made them, afterwards."""

    def close(self) -> None:
        """Safe to call twice."""
        api = library().api
        ctx, self.ctx = self.ctx, None
        model, self.model = self.model, None
        if ctx and self.is_ours:
            api.llama_free(ctx)
        if model and self.is_ours:
            api.llama_model_free(model)


def load(path: Path, options: ModelOptions, *, stop: StopFlag) -> Loaded:
    """Loads a model that generates text token by token.

    stop: raised, it ends the load early.

    Raises:
        StoppedError: that was so.
        ModelError: the file is missing, damaged or not a model llama.cpp can run.
        UnsupportedModelError: it runs, but does something else.
    """
    header = check(path)
    length = context_length(header)
    if not options.holds_several:
        length.warn(path, options.n_ctx)
    api = library().api
    loaded = Loaded(None, None, options.n_threads or default_threads())
    try:
        loaded.model = _load_model(path, options, overrides(header, path), stop=stop)
        vocab = api.llama_model_get_vocab(loaded.model)
        if api.llama_vocab_n_tokens(vocab) == 0 or api.llama_vocab_type(vocab) == 0:
            raise ModelError(f"{path} has no tokenizer; convert the model again, with one")
        refuse_if_stopped(stop)
        loaded.ctx = _make_context(path, options, loaded, n_ctx=length.choose(options.n_ctx))
        loaded.n_ctx = length.usable(api.llama_n_ctx(loaded.ctx))
        if not generates_text(loaded):
            raise UnsupportedModelError(
                f"{path} does not generate text token by token; use a decoder-only model"
            )
    except BaseException:
        loaded.close()
        raise
    return loaded


def generates_text(loaded: Loaded) -> bool:
    """Does the model say a text token by token, each from those before it?"""
    api = library().api
    has_memory = bool(api.llama_get_memory(loaded.ctx))
    return has_memory and not api.llama_model_has_encoder(loaded.model)


def n_sequences(model: Any) -> int:
    """How many sequences a context needs for trees and windows."""
    api = library().api
    has_state = api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model)
    return 1 if has_state else N_SEQUENCES  # each sequence would have a state of its own


def fit_context(params: Any, model: Any) -> None:
    """Makes the parameters of a context those that trees and windows need."""
    params.n_seq_max, params.kv_unified = n_sequences(model), True
    # llama.cpp reserves a row of logits for every sequence, and aborts if a batch has fewer
    params.n_batch = max(params.n_batch, params.n_seq_max)
    params.n_ubatch = max(params.n_ubatch, params.n_seq_max)
    params.swa_full = True  # a sliding-window cache of the window's size cannot be rolled back


def refuse_if_stopped(stop: StopFlag) -> None:
    """
    Raises:
        StoppedError: the flag is up.
    """
    if stop.is_up:
        raise StoppedError("the load was stopped")


def cause(messages: Sequence[str]) -> str:
    """The most telling of llama.cpp's messages: the first is the cause, the rest its echo."""
    lines = [line.strip(" .") for line in messages if line.strip(" .")]
    return lines[0].split("\n")[0] if lines else "llama.cpp gives no reason"


def _load_model(
    path: Path, options: ModelOptions, instead: dict[str, int], *, stop: StopFlag
) -> Any:
    api = library().api
    params = api.llama_model_default_params()
    params.n_gpu_layers = options.n_gpu_layers
    params.progress_callback = goes_on = library().unless_stopped(stop)
    with library().overriding(params, instead), library().messages() as messages:
        model = api.llama_model_load_from_file(os.fsencode(path), params)
    del goes_on  # was needed until here
    if not model:
        refuse_if_stopped(stop)
        raise ModelError(f"{path} cannot be loaded: {cause(messages)}")
    return model


def _make_context(path: Path, options: ModelOptions, loaded: Loaded, *, n_ctx: int) -> Any:
    api = library().api
    params = api.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = params.n_ubatch = options.n_batch
    params.n_threads = params.n_threads_batch = loaded.n_threads
    params.flash_attn_type = -1 if options.flash_attn is None else int(options.flash_attn)
    params.no_perf = True
    fit_context(params, loaded.model)
    if options.exact_kv:
        params.type_k = params.type_v = api.GGML_TYPE_F32
    if options.watch:
        params.cb_eval = options.watch.callback
    with library().messages() as messages:
        ctx = api.llama_init_from_model(loaded.model, params)
    if not ctx:
        raise ModelError(
            f"{path}: no context of {params.n_ctx} tokens: {cause(messages)}; "
            "try a smaller --ctx-size"
        )
    return ctx
