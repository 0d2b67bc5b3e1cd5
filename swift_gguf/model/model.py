"""A loaded model and its context: its properties, the costs of its passes, and decoding.

It works with token ids, not with text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

from swift_gguf.errors import (
    ContextFullError,
    DecodeError,
    NotFiniteError,
    SidecarError,
    SpoiledError,
    StateError,
    StoppedError,
    SubnetworkError,
    UnsupportedModelError,
)
from swift_gguf.gguf.sidecar import Sidecar, path_beside, read
from swift_gguf.model import state
from swift_gguf.model.cells import MAX_BRANCHES, TRUNK, Cells
from swift_gguf.model.loading import Loaded, ModelOptions, cause, load, n_sequences
from swift_gguf.native import (
    SUBLAYER_STATUS,
    Cost,
    FfnObserver,
    SidecarHandle,
    StopFlag,
    SubnetworkHandle,
    library,
)
from swift_gguf.schemas.matching import Vocabulary
from swift_gguf.subnetwork import SubNetwork

# From this width on (ggml_fa_tile_config::Q), llama.cpp's flash attention has a tiled kernel.
# Where none of ours run, it is right for prompts, not for verifying several rows.
PROMPT_WIDTH = 64

NARROW_MAX = 72
"""SWIFT_NARROW_MAX: no verification is wider."""


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """What a pass of one token saves if it skips this sub-layer."""

    status: str
    """``ok``; ``absent``: the layer has none; ``unshared``: the architecture builds it without
    llama.cpp's shared helpers; ``useless``: skipping saves nothing."""
    weight_bytes: int
    kv_bytes: int
    """With a full context."""
    n_nodes: int


class Model:
    """A loaded model and its context, which holds one text.

    Only one thread may use it at a time.

    Raises:
        ModelError: the file is missing or damaged, or llama.cpp cannot run the model.
    """

    def __init__(
        self,
        path: str | Path,
        options: ModelOptions | None = None,
        *,
        loaded: Loaded | None = None,
        stop: StopFlag | None = None,
    ) -> None:
        """Loads the model, or takes one that is loaded.

        loaded: a model from the same file and an empty context with the parameters of
            `fit_context`; None: load it.
        stop: raising the flag stops forward passes and the load; None: a flag of its own.
        """
        self.path = Path(path)
        self.options = options or ModelOptions()
        self.tokens: list[int] = []
        """The tokens the context holds, in order."""
        self.stop = stop or StopFlag()
        self._library = library()
        self._api = self._library.api
        self._handles = Handles(self.path, wanted=self.options.sidecar)
        self._batch: Any = None
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
        self.n_passes = 0
        """Forward passes so far.  The rows of logits stay the same until the next one."""
        self._outputs = range(0)
        self._fresh = (-1, -1)  # (n_passes, n_past) after the latest `decode` with logits
        self._is_invariant = False
        self._at_every_width = self._library.has_kernels(ctx)
        self._is_draft = False  # True if the latest pass was a draft pass
        n_branches = n_sequences(model)
        self._batch = api.llama_batch_init(self.n_batch, 0, n_branches)
        self.cells = Cells(
            api,
            ctx,
            capacity=self.n_ctx,
            n_sequences=1 if self.rollback_refusal else n_branches,
            n_swa=api.llama_model_n_swa(model),
        )

    @property
    def ctx(self) -> Any:
        """llama.cpp's context; None after `close`."""
        return self._loaded.ctx

    @property
    def _model(self) -> Any:
        return self._loaded.model

    @property
    def n_past(self) -> int:
        """The number of tokens in the context."""
        return len(self.tokens)

    def close(self) -> None:
        """Frees the model and everything else that it owns.  May be called twice."""
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
            self._batch = None
        self._handles.close()
        self._loaded.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        """llama.cpp's description: architecture, size and quantisation in a line."""
        return self._library.description(self._model)

    def metadata(self, key: str) -> str | None:
        """A value of the GGUF metadata as text; None if the key is missing."""
        return self._library.metadata(self._model, key)

    @property
    def has_experts(self) -> bool:
        """True for a mixture of experts.  A draft may run fewer experts."""
        architecture = self.metadata("general.architecture")
        return int(self.metadata(f"{architecture}.expert_count") or 0) > 0

    @property
    def rollback_refusal(self) -> str | None:
        """Why speculation is impossible with this model, or None if it is possible."""
        return self._library.rollback_refusal(self.ctx)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The text of the tokens, for constraints by a schema."""
        return Vocabulary.of(self.vocab)

    @cached_property
    def sublayers(self) -> tuple[list[Sublayer], list[Sublayer]]:
        """Attention and FFN of every layer, each [n_layer], from the graphs of llama.cpp."""
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
        """True if drafts must be chains.

        Flash attention sums the cells that a token sees one after the other.  Without it, the sums
        are split by the cells' numbers, so gaps between cells would change the result.
        """
        return self.options.flash_attn is False

    def is_eog(self, token: int) -> bool:
        """True if this token ends the generation."""
        return bool(self._api.llama_vocab_is_eog(self.vocab, token))

    # -- sub-networks ------------------------------------------------------------------------------

    @property
    def sidecar(self) -> Sidecar | None:
        """The sidecar (weights for draft passes) in use, if there is one."""
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
        """See `Library.observe_ffn`.  An exception in the observer stops the pass and is raised."""
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

    @property
    def machine_key(self) -> str:
        """What costs depend on besides the model and the context length: backend, offloaded layers,
        threads, flash attention; and by a digest, the processor and the library's version."""
        return self._library.machine_key(self.ctx)

    def pass_cost(
        self,
        subnetwork: SubNetwork | None = None,
        *,
        n_tokens: int = 1,
        n_outputs: int = 1,
        n_kv: int | None = None,
    ) -> Cost:
        """Bytes and operations of a forward pass, from the graph of llama.cpp.

        n_kv: the number of positions in the KV cache; None: the current number.
        """
        n_kv = self.n_past if n_kv is None else n_kv
        handle = self._handles.of(subnetwork)
        return self._library.pass_cost(
            self.ctx, handle, n_tokens=n_tokens, n_outputs=n_outputs, n_kv=n_kv
        )

    # -- decoding ----------------------------------------------------------------------------------

    n_branches = MAX_BRANCHES
    """Branches of a tree at most.  Each is a sequence."""

    @property
    def is_fresh(self) -> bool:
        """True if the last row of logits belongs to the last token of the context."""
        return self._fresh == (self.n_passes, self.n_past)

    @property
    def room(self) -> int:
        """The number of tree tokens that can be decoded without closing gaps."""
        return min(self.cells.free, self.n_batch)

    def decode(
        self,
        tokens: Sequence[int],
        *,
        n_outputs: int = 1,
        subnetwork: SubNetwork | None = None,
        exact: bool = True,
    ) -> None:
        """Appends tokens to the context; the last `n_outputs` of them get logits (rows 0, 1, ...).

        subnetwork: the part of the model that the pass runs; None: the full model.  Roll back what
            a sub-network has decoded before the full model decodes again.
        exact: rows are what single tokens would give, to the bit; without kernels of ours, up to
            `NARROW_MAX` tokens.  False: they need not be, which takes less time without ours.

        Raises:
            ContextFullError: the tokens do not fit; nothing is decoded.
            DecodeError: llama.cpp failed.
            StoppedError: the stop flag is up.

        After an error or an interrupt, the context is as before.  It is empty if the model cannot
        remove tokens, and shorter if the interrupt came during the bookkeeping of the cache.
        """
        if not 0 <= n_outputs <= min(len(tokens), self.n_batch):
            raise ValueError(
                f"{n_outputs} outputs do not fit {len(tokens)} tokens and batches of {self.n_batch}"
            )
        with self._undo_on_error():
            self._drop_tree()
            self._make_room(len(tokens))
            # outputs must all be in the last batch: earlier rows are overwritten
            start = 0
            while start < len(tokens):
                end = min(start + self.n_batch, len(tokens))
                if len(tokens) - n_outputs < end < len(tokens):
                    end = len(tokens) - n_outputs
                n_rows = n_outputs if end == len(tokens) else 0
                self._append(tokens[start:end], n_rows, subnetwork, exact=exact)
                start = end
        if n_outputs and subnetwork is None:
            self._fresh = (self.n_passes, self.n_past)

    def decode_tree(
        self, tokens: Sequence[int], parents: Sequence[int], *, subnetwork: SubNetwork | None = None
    ) -> None:
        """Decodes nodes of a tree that grows from the end of the context.  All of them get logits.

        Nodes are numbered from 0 over all calls since the last `keep` or `rollback`.  The tokens of
        the context stay as they are until `keep`.

        parents: for each node the number of an earlier node, which may be of this call.  -1: the
            end of the context.

        Raises: as in `decode`.  The tree is dropped then.
        """
        with self._undo_on_error():
            if not self.cells.nodes:
                self._make_room(len(tokens))
            nodes = self.cells.place(tokens, parents)
            if max(node.pos for node in nodes) >= self.n_ctx:
                raise ContextFullError(f"the tree does not fit the context of {self.n_ctx}")
            self._decode_batch(
                tokens,
                [node.pos for node in nodes],
                [node.sequences for node in nodes],
                n_outputs=len(tokens),
                subnetwork=subnetwork,
            )
            # All rows are wanted at once, and callers time the pass: a GPU may still be running.
            self._api.llama_synchronize(self.ctx)

    def keep(self, path: Sequence[int]) -> None:
        """Appends the nodes on `path` to the text and drops the others.

        path: nodes from the end of the context on.
        """
        with self._undo_on_error():
            self.tokens.extend(self.cells.keep(path))

    def redecode(
        self, start: int, n: int, *, subnetwork: SubNetwork | None = None, own_past: bool = False
    ) -> None:
        """Decodes n tokens of the context again from position `start` on, with logits for all.

        The context stays as it is.

        own_past: each token sees the keys and values that this pass computes for earlier tokens of
            the window, instead of those in the context.
        """
        with self._undo_on_error():
            self._drop_tree()
            self._make_room(n)
            branches = self.cells.window(start, 1 if own_past else n)
            self._decode_batch(
                self.tokens[start : start + n],
                range(start, start + n),
                [branches[:1]] * n if own_past else [[branch] for branch in branches],
                n_outputs=n,
                subnetwork=subnetwork,
            )
            self.cells.close_window()

    def _drop_tree(self) -> None:
        """Drops a tree that an interrupt left."""
        if self.cells.nodes:
            self.cells.rollback(self.n_past)

    @contextmanager
    def _undo_on_error(self) -> Iterator[None]:
        self._mend()
        before = self.n_past
        try:
            yield
        except BaseException:
            if self.rollback_refusal:
                self.clear()
            elif self.cells.certain is not None:
                self._mend()
            else:
                self.cells.forget_branches()
                self.rollback(before)
                self.cells.hold()
            raise

    def _mend(self) -> None:
        """Shortens the text to what is valid after an interrupt.

        It is called before every operation, because another interrupt may stop it.
        """
        self.cells.mend()
        del self.tokens[self.cells.n_trunk :]

    def _make_room(self, n: int) -> None:
        """Makes sure that `n` cells are free.  Closes gaps if necessary.

        Raises:
            ContextFullError: too few cells are free.
        """
        if n > self.cells.free + self.cells.n_parked:
            raise ContextFullError(
                f"{self.n_past + n} tokens do not fit the context of {self.n_ctx}; "
                "use a larger --ctx-size or a shorter prompt"
            )
        if n > self.cells.free:
            self.cells.close_gaps()

    def _append(
        self,
        tokens: Sequence[int],
        n_outputs: int,
        subnetwork: SubNetwork | None,
        *,
        exact: bool = True,
    ) -> None:
        start, end = self.n_past, self.n_past + len(tokens)
        n_outputs = min(n_outputs, len(tokens))
        self._decode_batch(
            tokens,
            range(start, end),
            [[TRUNK]] * len(tokens),
            n_outputs=n_outputs,
            subnetwork=subnetwork,
            exact=exact,
        )
        self.tokens.extend(tokens)
        self.cells.n_trunk += len(tokens)

    def _decode_batch(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[Sequence[int]],
        *,
        n_outputs: int,
        subnetwork: SubNetwork | None,
        exact: bool = True,
    ) -> None:
        if len(tokens) > self.n_batch:
            raise ValueError(f"{len(tokens)} tokens in a batch of {self.n_batch}")
        is_narrow = len(tokens) < PROMPT_WIDTH or (n_outputs > 1 and len(tokens) <= NARROW_MAX)
        self._choose_kernels(invariant=self._at_every_width or (exact and is_narrow))
        if not self._is_invariant:
            self.cells.close_gaps()
        self._library.set_subnetwork(self.ctx, self._handles.of(subnetwork))
        self._is_draft = subnetwork is not None
        batch, first = self._batch, len(tokens) - n_outputs
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = positions[i]
            batch.n_seq_id[i] = len(sequences[i])
            for k, sequence in enumerate(sequences[i]):
                batch.seq_id[i][k] = sequence
            batch.logits[i] = i >= first
        self.n_passes += 1
        with self._library.messages() as messages:
            code = self._api.llama_decode(self.ctx, batch)
        if code == 2:
            raise StoppedError("the pass was stopped")
        if code != 0:
            raise DecodeError(f"llama.cpp could not decode (code {code}): {cause(messages)}")
        self._outputs = range(first, len(tokens))

    def _choose_kernels(self, *, invariant: bool) -> None:
        if self._is_invariant != invariant:
            self._library.set_batch_invariant(self.ctx, invariant)
            self._is_invariant = invariant

    def output_index(self, row: int) -> int:
        """llama.cpp's index of an output row of the last batch."""
        return self._outputs[row]

    def top(self, row: int, k: int = 1) -> tuple[list[int], list[float]]:
        """The k likeliest tokens of an output row and their probabilities at temperature 1.

        Raises:
            SpoiledError: logits of a draft pass are not finite.
            NotFiniteError: logits of the full model are not finite.
        """
        try:
            return self._library.top(self.ctx, self._outputs[row], k)
        except NotFiniteError as error:
            if self._is_draft:
                raise self._spoiled() from error
            raise

    def _spoiled(self) -> SpoiledError:
        """Empties the cache: what a bad draft pass wrote may spoil every later pass."""
        self.cells.spoiled = True
        if not self.cells.nodes:
            self.clear()
        sidecar = self.sidecar
        weights = f"{sidecar.path} or of the model" if sidecar else "the model"
        return SpoiledError(
            f"logits of a draft pass are not finite: weights of {weights} are damaged; "
            + ("use --sidecar none" if sidecar else "use --speculation off")
        )

    def logits(self, row: int) -> Any:
        """A copy of an output row's logits, float32 [n_vocab]."""
        return self.logits_at(self._outputs[row])

    def logits_at(self, index: int) -> Any:
        """As `logits`, for an index from `output_index`."""
        return self._library.logits(self.ctx, index, self.n_vocab)

    def rollback(self, n_past: int) -> None:
        """Removes the tree and all tokens from position `n_past` on.

        Raises:
            UnsupportedModelError: the model cannot remove tokens (recurrent state).  The context
                is unchanged.
        """
        self._mend()
        try:
            self.cells.rollback(n_past)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"cannot remove tokens: {self.rollback_refusal}; use --speculation off"
            ) from error
        finally:
            self._mend()

    def clear(self) -> None:
        """Removes all tokens.  This is always possible."""
        try:
            self.cells.clear()
        finally:
            self._mend()

    # -- states in files ---------------------------------------------------------------------------

    def save_state(
        self,
        file: BinaryIO,
        *,
        n_tokens: int | None = None,
        notes: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> int:
        """Writes the state of the context, or of its first `n_tokens` tokens.

        Returns the size in bytes.

        notes: JSON; `load_state` returns them.
        limit: of the size, in bytes.

        Raises:
            StateError: the state is larger than the limit.
            UnsupportedModelError: less than the context, but the model cannot take tokens back.
            OSError: the file cannot be written.
        """
        self._mend()
        self._drop_tree()
        tokens = self.tokens[:n_tokens]
        if len(tokens) < self.n_past and self.rollback_refusal:
            raise UnsupportedModelError(f"no state of less than the text: {self.rollback_refusal}")
        pieces = self.cells.states(len(tokens))
        return state.write(file, self._identity(), tokens, pieces, notes=notes, limit=limit)

    def load_state(self, file: BinaryIO) -> Mapping[str, Any]:
        """Replaces the context by a saved one, to the bit.  Returns the notes saved with it.

        Raises:
            StateError: the file is damaged, or its state is of another model, library or kind of
                context.  The context may be empty then.
            OSError: the file cannot be read.
        """
        saved = state.read(file, self._identity())
        self.clear()
        self._fresh = (-1, -1)
        self.tokens[:] = saved.tokens  # `_mend` shortens them after an interrupt
        try:
            for end, piece in saved.pieces:
                self.cells.put(piece, end)
        except (DecodeError, OSError, StateError) as error:
            self.clear()
            raise error if isinstance(error, OSError) else StateError(str(error)) from error
        return saved.notes

    def _identity(self) -> dict[str, Any]:
        sidecar = self.sidecar.path if self.sidecar else None
        return state.identity(self.path, self.options, n_ctx=self.n_ctx, sidecar=sidecar)

    # -- for others that use the context -----------------------------------------------------------

    def hand_over(self) -> None:
        """Prepares the context for other code: the text in one sequence, and the full model."""
        with self._undo_on_error():
            self._drop_tree()
            self.cells.only_trunk()
        self._library.set_subnetwork(self.ctx, None)
        self._choose_kernels(invariant=self._at_every_width)

    def take_back(self) -> None:
        """Takes the context back after `hand_over`, with the same text."""
        self._mend()
        self.cells.hold()

    def assume(self, tokens: Sequence[int]) -> None:
        """Takes over a context that other code filled with these tokens, or with more."""
        self._fresh = (-1, -1)
        self.cells.assume(len(tokens))
        self.tokens[:] = tokens


class Handles:
    """Native sub-networks of a model.  Each is created when a pass first needs it.

    path: the model's file.
    wanted: the sidecar to use; ``auto``: the one beside the model, if it fits the model.
    """

    def __init__(self, path: Path, *, wanted: Path | Literal["auto"] | None) -> None:
        self.sidecar: Sidecar | None = None
        self.refusal: str | None = None
        """Why the sidecar beside the model is not used, if there is one."""
        self.loaded_sidecar: SidecarHandle | None = None
        self._path, self._wanted = path, wanted
        self._model: Any = None
        self._has_experts = False
        self._made: dict[SubNetwork, SubnetworkHandle] = {}

    def open(self, model: Any, *, n_layer: int, has_experts: bool) -> None:
        """Reads the sidecar's header.  Its weights are loaded when a pass first needs them.

        model: llama.cpp's model, which must not be freed before `close`.
        has_experts: a mixture of experts is narrowed without a sidecar.

        Raises:
            SidecarError: the sidecar was named by the user, and it cannot be used.
        """
        self._model, self._has_experts = model, has_experts
        place = path_beside(self._path) if self._wanted == "auto" else self._wanted
        if place is None or (self._wanted == "auto" and not place.exists()):
            return
        try:
            found = read(place, model=self._path)
            if len(found.n_narrow) != n_layer:
                raise SidecarError(
                    f"{place} is for {len(found.n_narrow)} layers, but the model has {n_layer}; "
                    "run swift-gguf prepare"
                )
            self.sidecar = found
        except SidecarError as error:
            self.leave_aside(error)

    def leave_aside(self, error: SidecarError) -> None:
        """Continues without the sidecar, unless the user named it.

        Raises:
            SidecarError: `error`, if the user named the sidecar.
        """
        if self._wanted != "auto":
            raise error
        self.sidecar, self.refusal = None, str(error)

    def of(self, subnetwork: SubNetwork | None) -> SubnetworkHandle | None:
        """The native sub-network; None: the full model.

        Raises:
            SubnetworkError: the sub-network needs a sidecar, and there is none.
            SidecarError: the sidecar cannot be loaded.
        """
        if subnetwork is None:
            return None
        if subnetwork not in self._made:
            is_narrow = subnetwork.narrow_ffn and not self._has_experts
            sidecar = self._load_sidecar() if is_narrow or subnetwork.draft_head else None
            self._made[subnetwork] = library().subnetwork(subnetwork, sidecar)
        return self._made[subnetwork]

    def _load_sidecar(self) -> SidecarHandle:
        if self._model is None or self.sidecar is None:
            raise SubnetworkError(
                "a narrow FFN or a draft head needs a sidecar; run swift-gguf prepare"
            )
        if self.loaded_sidecar is None:
            self.loaded_sidecar = library().sidecar(self._model, self.sidecar.path)
        return self.loaded_sidecar

    def usable_sidecar(self) -> Sidecar | None:
        """The loaded sidecar, if there is one.

        A sidecar that was found beside the model is not used if it cannot be loaded.

        Raises:
            SidecarError: the sidecar was named by the user, and it cannot be loaded.
        """
        try:
            if self._model is not None and self.sidecar is not None:
                self._load_sidecar()
        except SidecarError as error:
            self.leave_aside(error)
        return self.sidecar

    def close(self) -> None:
        """Frees the sub-networks and the sidecar.  Called before the model is freed."""
        self._made.clear()
        self.loaded_sidecar = self._model = None
