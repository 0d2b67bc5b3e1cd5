"""Decoding, logits, rollback.  Token ids only, no text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from swift_gguf.errors import (
    ContextFullError,
    DecodeError,
    NotFiniteError,
    SpoiledError,
    StoppedError,
    UnsupportedModelError,
)
from swift_gguf.model.cells import TRUNK, Cells
from swift_gguf.model.loading import ModelOptions as ModelOptions
from swift_gguf.model.loading import cause, n_sequences
from swift_gguf.model.open_model import OpenModel
from swift_gguf.subnetwork import SubNetwork

# From this width on (ggml_fa_tile_config::Q), CPU flash attention has a tiled kernel: right for
# prefill; never used where several rows are asked for, as in a verification.
PREFILL_WIDTH = 64

# SWIFT_NARROW_MAX: no verification is wider, and kernels for prompts are faster there.
NARROW_MAX = 72


class Model(OpenModel):
    """A model with one sequence in one context.  Not safe for use by several threads at once.

    Raises:
        ModelError: the file is missing, damaged or not a model llama.cpp can run.
    """

    _batch: Any = None

    def _set_up(self) -> None:
        super()._set_up()
        self.n_passes = 0
        """Passes so far: while it stands still, so do the rows of logits."""
        self._outputs = range(0)
        self._invariant = False
        self._is_draft = False  # was the latest pass one?
        n_branches = n_sequences(self._model)
        self._batch = self._api.llama_batch_init(self.n_batch, 0, n_branches)
        self.cells = Cells(
            self._api,
            self.ctx,
            capacity=self.n_ctx,
            n_sequences=1 if self.rollback_refusal else n_branches,
            n_swa=self._api.llama_model_n_swa(self._model),
        )

    def close(self) -> None:
        """Frees everything that is its own; safe to call twice."""
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
            self._batch = None
        super().close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- decoding ----------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many tokens of a tree can be decoded where gaps stay open."""
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

        subnetwork: what the pass runs; None: the whole model.  What is decoded under a sub-network
            must be rolled back before the whole model goes on.
        exact: rows are what single tokens would give, to the bit, up to `NARROW_MAX` tokens; False:
            as fast as it goes.

        Raises:
            ContextFullError: they do not fit; nothing is decoded.
            DecodeError: llama.cpp failed.
            StoppedError: the stop flag is up.

        Whatever is raised, an interrupt included, the context is as before (or empty, if the model
        cannot take tokens back; or shorter, where an interrupt hit the cache's bookkeeping).
        """
        if not 0 <= n_outputs <= min(len(tokens), self.n_batch):
            raise ValueError(
                f"{n_outputs} outputs of {len(tokens)} tokens in batches of {self.n_batch}"
            )
        with self._undo_on_error():
            self._drop_tree()
            self._make_room(len(tokens))
            # outputs must all be in the last batch: earlier rows are overwritten
            body = len(tokens) - n_outputs
            cuts = [*range(0, body, self.n_batch), body] if len(tokens) > self.n_batch else [0]
            for start, end in zip(cuts, [*cuts[1:], len(tokens)], strict=True):
                if start < end:
                    n_rows = n_outputs if end == len(tokens) else 0
                    self._append(tokens[start:end], n_rows, subnetwork, exact=exact)

    def decode_tree(
        self, tokens: Sequence[int], parents: Sequence[int], *, subnetwork: SubNetwork | None = None
    ) -> None:
        """Decodes nodes of a tree that grows from the end of the context; all of them get logits.

        Nodes are numbered from 0 on, over all calls since the last `keep` or `rollback`.  The
        context's own tokens stay as they are until `keep`.

        parents: of each, the number of a node before it (of this call, too), or -1: the context's
            end.

        Raises: as `decode`; the tree is gone then.
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

    def keep(self, path: Sequence[int]) -> None:
        """The nodes on `path`, from the context's end on, become text; the others are gone."""
        with self._undo_on_error():
            self.tokens.extend(self.cells.keep(path))

    def redecode(
        self, start: int, n: int, *, subnetwork: SubNetwork | None = None, own_past: bool = False
    ) -> None:
        """Decodes n tokens of the context once more, from position `start` on, with logits for all,
        and leaves the context as it is.

        own_past: each sees what this pass made of those before it in the window, not the context's.
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
        """One that an interrupt left before anything of it was kept."""
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
        """What an interrupt left half done becomes a shorter text; called before anything else is
        done, for an interrupt may come while one is mended."""
        self.cells.mend()
        del self.tokens[self.cells.n_trunk :]

    def _make_room(self, n: int) -> None:
        """Cells for `n` tokens, if need be by closing gaps.

        Raises:
            ContextFullError: there are none.
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
        is_narrow = len(tokens) < PREFILL_WIDTH or (n_outputs > 1 and len(tokens) <= NARROW_MAX)
        invariant = exact and is_narrow
        if invariant != self._invariant:
            self._library.set_batch_invariant(self.ctx, invariant)
            self._invariant = invariant
        if not invariant:
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

    def output_index(self, row: int) -> int:
        """Row of the last decode's outputs -> index llama.cpp knows it by."""
        return self._outputs[row]

    def top(self, row: int, k: int = 1) -> tuple[list[int], list[float]]:
        """The k likeliest tokens of an output row and their probabilities at temperature 1.

        Raises:
            SpoiledError: those of a draft pass are not finite.
            NotFiniteError: those of the whole model are not.
        """
        try:
            return self._library.top(self.ctx, self._outputs[row], k)
        except NotFiniteError as error:
            if self._is_draft:
                raise self._spoiled() from error
            raise

    def _spoiled(self) -> SpoiledError:
        """What a draft pass wrote may spoil every pass after it: nothing of the cache is kept."""
        self.cells.spoiled = True
        if not self.cells.nodes:
            self.clear()
        sidecar = self.sidecar
        weights = f"{sidecar.path} or of the model" if sidecar else "the model"
        return SpoiledError(
            f"a draft's logits are not finite: weights of {weights} are damaged; "
            + ("use --sidecar none" if sidecar else "use --speculation off")
        )

    def logits(self, row: int) -> Any:
        """A copy of an output row's logits, float32 [n_vocab]."""
        return self.logits_at(self._outputs[row])

    def logits_at(self, index: int) -> Any:
        """As `logits`, of an index that `output_index` gave."""
        return self._library.logits(self.ctx, index, self.n_vocab)

    def rollback(self, n_past: int) -> None:
        """Forgets all tokens from position `n_past` on, exactly, and any tree.

        Raises:
            UnsupportedModelError: the model cannot (recurrent state); it is as before.
        """
        self._mend()
        try:
            self.cells.rollback(n_past)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"cannot take tokens back: {self.rollback_refusal}; use --speculation off"
            ) from error
        finally:
            self._mend()

    def clear(self) -> None:
        """Forgets all tokens; always possible."""
        try:
            self.cells.clear()
        finally:
            self._mend()

    # -- for others that use the context -----------------------------------------------------------

    def hand_over(self) -> None:
        """Makes the context llama.cpp's as it comes: the text in one sequence, the whole model."""
        with self._undo_on_error():
            self._drop_tree()
            self.cells.only_trunk()
        self._library.set_subnetwork(self.ctx, None)
        self._library.set_batch_invariant(self.ctx, False)
        self._invariant = False

    def take_back(self) -> None:
        """The context is ours again, with the same text."""
        self._mend()
        self.cells.hold()

    def assume(self, tokens: Sequence[int]) -> None:
        """The context was filled by somebody else, with these tokens or more."""
        self.cells.assume(len(tokens))
        self.tokens[:] = tokens
