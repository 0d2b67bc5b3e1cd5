"""A model in memory and its context: what it is, and what its passes cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from swift_gguf.errors import SidecarError, StoppedError
from swift_gguf.gguf.sidecar import Sidecar
from swift_gguf.model.handles import Handles
from swift_gguf.model.loading import Loaded, ModelOptions, load
from swift_gguf.native import SUBLAYER_STATUS, Cost, FfnObserver, StopFlag, library
from swift_gguf.schemas.matching import Vocabulary
from swift_gguf.subnetwork import SubNetwork


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """What skipping one sub-layer would save in a one-token pass."""

    status: str
    """``ok``; ``absent``: the layer has none; ``unshared``: the architecture builds it without
    llama.cpp's shared helpers; ``useless``: skipping saves nothing."""
    weight_bytes: int
    kv_bytes: int
    """At a full context."""
    n_nodes: int


class OpenModel:
    """A model's file, loaded, with a context of its own; `Model` decodes with it.

    Raises:
        ModelError: the file is missing, damaged or not a model llama.cpp can run.
    """

    def __init__(
        self,
        path: str | Path,
        options: ModelOptions | None = None,
        *,
        loaded: Loaded | None = None,
        stop: StopFlag | None = None,
    ) -> None:
        """loaded: use these, made elsewhere of the same file, in a context that `fit_context` made
        ready and that is empty; None: load it.
        stop: ends the load, too; None: one of its own."""
        self.path = Path(path)
        self.options = options or ModelOptions()
        self.tokens: list[int] = []
        """The tokens the context holds, in order."""
        self.stop = stop or StopFlag()
        self._library = library()
        self._api = self._library.api
        self._handles = Handles(self.path, wanted=self.options.sidecar)
        self._loaded = loaded or load(self.path, self.options, stop=self.stop)
        try:
            self._set_up()
            self._handles.open(self._model, n_layer=self.n_layer, has_experts=self.has_experts)
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        api, model, ctx = self._api, self._model, self.ctx
        self.vocab = api.llama_model_get_vocab(model)
        self.n_layer: int = api.llama_model_n_layer(model)
        self.n_vocab: int = api.llama_vocab_n_tokens(self.vocab)
        self.n_ctx = self._loaded.n_ctx
        self.n_batch: int = api.llama_n_batch(ctx)
        self._library.set_stop_flag(ctx, self.stop)

    @property
    def ctx(self) -> Any:
        """llama.cpp's context; None once it is closed."""
        return self._loaded.ctx

    @property
    def _model(self) -> Any:
        return self._loaded.model

    @property
    def n_past(self) -> int:
        """How many tokens the context holds."""
        return len(self.tokens)

    def close(self) -> None:
        """Frees everything that is its own; safe to call twice."""
        self._handles.close()
        self._loaded.close()

    def __del__(self) -> None:
        if hasattr(self, "_loaded"):
            self.close()

    # -- what the model is -------------------------------------------------------------------------

    @property
    def n_threads(self) -> int:
        return self._loaded.n_threads

    @property
    def n_ctx_train(self) -> int:
        return int(self._api.llama_model_n_ctx_train(self._model))

    @property
    def n_params(self) -> int:
        return int(self._api.llama_model_n_params(self._model))

    @property
    def n_bytes(self) -> int:
        """Size of all tensors."""
        return int(self._api.llama_model_size(self._model))

    @property
    def description(self) -> str:
        """Architecture, size and quantisation in a line, as llama.cpp puts it."""
        return self._library.description(self._model)

    def metadata(self, key: str) -> str | None:
        """A value of the GGUF's metadata as text, or None."""
        return self._library.metadata(self._model, key)

    @property
    def has_experts(self) -> bool:
        """Is it a mixture of experts, of which a draft may run fewer?"""
        architecture = self.metadata("general.architecture")
        return int(self.metadata(f"{architecture}.expert_count") or 0) > 0

    @property
    def rollback_refusal(self) -> str | None:
        """Why speculation is impossible with this model, or None if it is possible."""
        return self._library.rollback_refusal(self.ctx)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What tokens stand for, to hold answers to a schema."""
        return Vocabulary.of(self.vocab)

    @cached_property
    def sublayers(self) -> tuple[list[Sublayer], list[Sublayer]]:
        """Attention and FFN of every layer, each [n_layer], from the graphs llama.cpp builds."""
        attention, ffn = (
            [
                Sublayer(
                    status=SUBLAYER_STATUS[item.status],
                    weight_bytes=item.weight_bytes,
                    kv_bytes=item.kv_bytes,
                    n_nodes=item.n_nodes,
                )
                for item in kind
            ]
            for kind in self._library.sublayers(self.ctx, self.n_layer)
        )
        return attention, ffn

    @property
    def only_chains(self) -> bool:
        """Must drafts be chains?  Flash attention sums up the cells that a token sees one after the
        other.  Without it, sums are shared out by the cells' numbers, so that gaps change them."""
        return self.options.flash_attn is False

    def is_eog(self, token: int) -> bool:
        """Does this token end a generation?"""
        return bool(self._api.llama_vocab_is_eog(self.vocab, token))

    # -- sub-networks ------------------------------------------------------------------------------

    @property
    def sidecar(self) -> Sidecar | None:
        """The weights for draft passes that were found."""
        return self._handles.sidecar

    @property
    def sidecar_refusal(self) -> str | None:
        """Why the sidecar beside the model is not used, if there is one."""
        return self._handles.refusal

    def usable_sidecar(self) -> Sidecar | None:
        """See `Handles.usable_sidecar`."""
        return self._handles.usable_sidecar()

    def leave_sidecar_aside(self, error: SidecarError) -> None:
        """See `Handles.leave_aside`."""
        self._handles.leave_aside(error)

    @contextmanager
    def observe_ffn(self, observer: FfnObserver) -> Iterator[None]:
        """See `Library.observe_ffn`.  Where the observer raises, a Ctrl-C included, passes stop."""
        failed: list[BaseException] = []

        def guarded(layer: int, inputs: Any, activations: Any, output: Any) -> None:
            try:
                observer(layer, inputs, activations, output)
            except BaseException as error:
                failed.append(error)
                self.stop.raise_()

        try:
            with self._library.observe_ffn(self.ctx, guarded, self._handles.loaded_sidecar):
                yield
        except StoppedError:
            if not failed:
                raise
        finally:
            if failed:
                self.stop.lower()
        if failed:
            raise failed[0]

    def pass_cost(
        self,
        subnetwork: SubNetwork | None = None,
        *,
        n_tokens: int = 1,
        n_outputs: int = 1,
        n_kv: int | None = None,
    ) -> Cost:
        """Bytes and operations of a pass, from the graph llama.cpp would run.

        n_kv: positions the cache holds; default: as many as now.
        """
        n_kv = self.n_past if n_kv is None else n_kv
        handle = self._handles.of(subnetwork)
        return self._library.pass_cost(
            self.ctx, handle, n_tokens=n_tokens, n_outputs=n_outputs, n_kv=n_kv
        )
