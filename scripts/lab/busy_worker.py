"""One side of `lab.busy`: answers prompts with stock llama.cpp or with us, and times them."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter

from lab.worker import Jobs, work

N_CTX = 1024


class Stock:
    """llama.cpp's own API: greedy, one token per pass."""

    def __init__(self, model: str, n_threads: int, n_gpu_layers: int) -> None:
        import llama_cpp

        self._llama = llama_cpp.Llama(
            model,
            n_ctx=N_CTX,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            flash_attn=True,
            verbose=False,
        )

    def __call__(self, text: str, n_tokens: int) -> float:
        """Greedy with C calls only: `Llama.sample` builds arrays in Python."""
        import llama_cpp as api

        llama = self._llama
        llama.reset()
        llama.eval(llama.tokenize(text.encode()))
        sampler = api.llama_sampler_init_greedy()
        batch = api.llama_batch_init(1, 0, 1)
        try:
            token = api.llama_sampler_sample(sampler, llama.ctx, -1)
            n_past, start = llama.n_tokens, perf_counter()
            for i in range(n_tokens):
                batch.n_tokens, batch.token[0], batch.pos[0] = 1, token, n_past + i
                batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 0, True
                api.llama_decode(llama.ctx, batch)
                token = api.llama_sampler_sample(sampler, llama.ctx, -1)
            return n_tokens / (perf_counter() - start)
        finally:
            api.llama_batch_free(batch)
            api.llama_sampler_free(sampler)


class Ours:
    """The engine of `swift-gguf generate`: greedy, with or without drafts."""

    def __init__(self, model: str, n_threads: int, n_gpu_layers: int, *, drafts: bool) -> None:
        from swift_gguf.model import Model, ModelOptions
        from swift_gguf.session import Session
        from swift_gguf.speculation import Speculation, SpeculationOptions

        loaded = Model(
            Path(model), ModelOptions(n_ctx=N_CTX, n_threads=n_threads, n_gpu_layers=n_gpu_layers)
        )
        speculation = Speculation(loaded, SpeculationOptions(mode="auto" if drafts else "off"))
        self._session = Session(loaded, speculation)

    def __call__(self, text: str, n_tokens: int) -> float:
        from swift_gguf.sampling.sampling import SamplingOptions
        from swift_gguf.text.text import encode

        session = self._session
        answer = session.answer(
            encode(session.model, text), SamplingOptions(temperature=0), max_tokens=n_tokens + 1
        )
        for _ in answer:
            pass
        return answer.stats.cycle_n / answer.stats.cycle_s


def load() -> Jobs:
    kind, model, *numbers = sys.argv[1:]
    n_threads, n_gpu_layers = map(int, numbers)
    if kind == "stock":
        return {"answer": Stock(model, n_threads, n_gpu_layers)}
    return {"answer": Ours(model, n_threads, n_gpu_layers, drafts=kind == "auto")}


if __name__ == "__main__":
    work(load)
