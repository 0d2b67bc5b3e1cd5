"""Loads llama.cpp's model and creates a context that is ready for speculation."""

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
    """Options of loading a model, named as on llama.cpp's command line."""

    n_ctx: int | None = None
    """Context size in tokens.  None: 4096, or the trained length if that is less.  0: the trained
    length.  It is never more than the model's table of learned positions."""
    holds_several: bool = False
    """True: the context holds several texts, each shorter than the context."""
    n_batch: int = 512
    """Tokens in a batch of prompt processing; at least 48, so that trees and windows fit."""
    n_threads: int | None = None
    """None: see `threads.default_threads`."""
    n_gpu_layers: int = -1
    """-1: all layers, if there is a GPU."""
    flash_attn: bool | None = None
    """None: if the backend supports it.  The text may differ with and without it."""
    sidecar: Path | Literal["auto"] | None = "auto"
    """Weights for draft passes; ``auto``: the sidecar beside the model, if it fits the model."""
    exact_kv: bool = False
    """True: 32-bit keys and values instead of llama.cpp's 16 bits.  Slow; for comparisons."""
    watch: ProductWatch | None = None
    """Observes every product with a weight in a forward pass.  Slow."""


@dataclass
class Loaded:
    """A model of llama.cpp and its context."""

    model: Any
    ctx: Any
    n_threads: int
    n_ctx: int = 0
    """Tokens that the context can hold.  Fewer than its size if the model has fewer positions."""
    is_ours: bool = True
    """True: `close` frees the model and the context.  False: their creator does."""

    def close(self) -> None:
        """Frees the model and the context.  May be called twice."""
        api = library().api
        ctx, self.ctx = self.ctx, None
        model, self.model = self.model, None
        if ctx and self.is_ours:
            api.llama_free(ctx)
        if model and self.is_ours:
            api.llama_model_free(model)


def load(path: Path, options: ModelOptions, *, stop: StopFlag) -> Loaded:
    """Loads a model that generates text token by token.

    stop: raising the flag stops the load.

    Raises:
        StoppedError: the load was stopped.
        ModelError: the file is missing or damaged, or llama.cpp cannot run the model.
        UnsupportedModelError: the model does not generate text token by token.
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
            raise ModelError(f"{path} has no tokenizer; convert the model again with its tokenizer")
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
    """True if the model generates text token by token, each from the tokens before it."""
    api = library().api
    has_memory = bool(api.llama_get_memory(loaded.ctx))
    return has_memory and not api.llama_model_has_encoder(loaded.model)


def n_sequences(model: Any) -> int:
    """The number of sequences that a context needs for trees and windows."""
    api = library().api
    has_state = api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model)
    return 1 if has_state else N_SEQUENCES  # recurrent: each sequence has its own state


def fit_context(params: Any, model: Any) -> None:
    """Sets the parameters of a context that trees and windows need."""
    params.n_seq_max, params.kv_unified = n_sequences(model), True
    # llama.cpp reserves a row of logits for every sequence, and aborts if a batch has fewer
    params.n_batch = max(params.n_batch, params.n_seq_max)
    params.n_ubatch = max(params.n_ubatch, params.n_seq_max)
    params.swa_full = True  # a sliding-window cache of the window's size cannot be rolled back


def refuse_if_stopped(stop: StopFlag) -> None:
    """Ends a load that was stopped.

    Raises:
        StoppedError: the flag is up.
    """
    if stop.is_up:
        raise StoppedError("the load was stopped")


def cause(messages: Sequence[str]) -> str:
    """The first of llama.cpp's messages, which is the cause.  The others follow from it."""
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
    del goes_on  # llama.cpp needs it until here
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
            f"{path}: cannot create a context of {params.n_ctx} tokens ({cause(messages)}); "
            "use a smaller --ctx-size"
        )
    return ctx
