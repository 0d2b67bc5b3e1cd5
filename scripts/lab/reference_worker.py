"""One side of `lab.reference`: passes of fixed tokens, timed, and the logits they give."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from time import perf_counter

from lab.worker import Jobs, work

N_PROMPT = 256
"""Tokens of the timed prefill, and the context length of timed decoding."""
N_DECODE = 8
"""Single tokens decoded in one go."""
N_CTX = 512
# What is compared bit by bit: so many rows of a prefill, single tokens, and batches of 4.
LOGIT_PREFILL = 64
LOGIT_PREFILL_ROWS = 16
LOGIT_SINGLES = 16
LOGIT_BATCHES = 8
LOGIT_WIDTH = 4


class Decoder:
    """llama.cpp's own API and nothing else."""

    def __init__(self, path: str, n_threads: int, n_gpu_layers: int) -> None:
        # Here, not above: the parent takes `N_PROMPT` from this module, and loads no library.
        import llama_cpp.llama_cpp as api

        self._api = api
        self._log = api.llama_log_callback(lambda level, text, _: None)
        api.llama_log_set(self._log, ctypes.c_void_p(0))
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = n_gpu_layers
        model = api.llama_model_load_from_file(path.encode(), model_params)
        if not model:
            raise RuntimeError(f"{path} cannot be loaded")
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = N_CTX
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = n_threads
        params.no_perf = True
        self._ctx = api.llama_init_from_model(model, params)
        if not self._ctx:
            raise RuntimeError(f"{path}: no context")
        self._memory = api.llama_get_memory(self._ctx)
        self._n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_batch_init(N_CTX, 0, 1)
        self._n_past = 0

    def _restart(self) -> None:
        self._api.llama_memory_clear(self._memory, True)
        self._n_past = 0

    def _decode(self, n_tokens: int, n_rows: int) -> list[int]:
        """Decodes fixed tokens, the last n_rows with logits; the rows' indices."""
        batch = self._batch
        batch.n_tokens = n_tokens
        for i in range(n_tokens):
            position = self._n_past + i
            batch.token[i] = 7919 * position % self._n_vocab
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= n_tokens - n_rows
        if code := self._api.llama_decode(self._ctx, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        self._n_past += n_tokens
        return list(range(n_tokens - n_rows, n_tokens))

    def _hash(self, row: int) -> str:
        pointer = self._api.llama_get_logits_ith(self._ctx, row)
        return hashlib.sha256(ctypes.string_at(pointer, 4 * self._n_vocab)).hexdigest()

    def logits(self) -> dict[str, str]:
        """sha256 of the float32 bytes of each row, by what the row is."""
        self._restart()
        rows = self._decode(LOGIT_PREFILL, LOGIT_PREFILL_ROWS)
        found = {f"prefill {row}": self._hash(row) for row in rows}
        for i in range(LOGIT_SINGLES):
            (row,) = self._decode(1, 1)
            found[f"single {i}"] = self._hash(row)
        for i in range(LOGIT_BATCHES):
            for row in self._decode(LOGIT_WIDTH, LOGIT_WIDTH):
                found[f"batch of {LOGIT_WIDTH}, {LOGIT_WIDTH * i + row}"] = self._hash(row)
        return found

    def prefill(self) -> list[float]:
        """Seconds of a prefill of N_PROMPT tokens."""
        self._restart()
        return [self._timed(N_PROMPT)]

    def decode(self) -> list[float]:
        """Seconds of each of N_DECODE single tokens after N_PROMPT others."""
        if not N_PROMPT <= self._n_past < N_CTX - N_DECODE:
            self.prefill()
        self._decode(1, 1)  # builds the graph
        return [self._timed(1) for _ in range(N_DECODE)]

    def _timed(self, n_tokens: int) -> float:
        start = perf_counter()
        self._decode(n_tokens, 1)
        self._api.llama_synchronize(self._ctx)
        return perf_counter() - start


def load() -> Jobs:
    model, n_threads, n_gpu_layers = sys.argv[1:]
    decoder = Decoder(model, int(n_threads), int(n_gpu_layers))
    return {
        "logits": decoder.logits,
        "decode": decoder.decode,
        "prefill": decoder.prefill,
    }


if __name__ == "__main__":
    work(load)
