"""Embeddings with the model's own weights, in a small context of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swift_gguf.errors import DecodeError, ModelError
from swift_gguf.native import StopFlag, library

MAX_TOKENS = 2048
"""Tokens of a text.  Pooling needs the whole text in one batch, and that takes memory."""
MEAN = 1  # LLAMA_POOLING_TYPE_MEAN


class Embedder:
    """A context for embeddings.  llama.cpp pools them.

    model: llama.cpp's model.  `close` does not free it.
    pools: the model has a pooling type of its own.  False: the mean of all tokens.
    """

    def __init__(self, model: Any, *, n_threads: int, pools: bool, stop: StopFlag) -> None:
        self._api = api = library().api
        self.n_max = min(MAX_TOKENS, api.llama_model_n_ctx_train(model) or MAX_TOKENS)
        self._n_embd = api.llama_model_n_embd(model)
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.n_max
        params.n_threads = params.n_threads_batch = n_threads
        params.embeddings, params.no_perf = True, True
        if not pools:
            params.pooling_type = MEAN
        self._ctx = api.llama_init_from_model(model, params)
        if not self._ctx:
            raise ModelError("cannot create a context for embeddings: free some memory")
        library().set_stop_flag(self._ctx, stop)
        self._batch = api.llama_batch_init(self.n_max, 0, 1)

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The embedding as a vector of length 1, float32 [n_embd].

        Raises:
            DecodeError: llama.cpp failed.
        """
        api, batch = self._api, self._batch
        if memory := api.llama_get_memory(self._ctx):
            api.llama_memory_clear(memory, True)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        code = api.llama_decode(self._ctx, batch)
        pointer = api.llama_get_embeddings_seq(self._ctx, 0)
        if code != 0 or not pointer:
            raise DecodeError(f"llama.cpp could not embed the text (code {code})")
        vector = np.array(pointer[: self._n_embd], np.float32)
        norm = float(np.linalg.norm(vector))
        return vector / np.float32(norm) if norm else vector

    def close(self) -> None:
        """Frees the context.  May be called twice."""
        if self._ctx:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._ctx)
            self._ctx = None
