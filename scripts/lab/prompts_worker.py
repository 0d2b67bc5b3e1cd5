"""Our side of `lab.prompts`: prompts of fixed tokens, read as a program would."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter

from lab.worker import Jobs, work


def load() -> Jobs:
    # Here, not above: the parent takes the library's place from the environment.
    from swift_gguf.model import Model, ModelOptions

    path, n_threads, n_gpu_layers, n_ctx = sys.argv[1:]
    options = ModelOptions(
        n_ctx=int(n_ctx), n_threads=int(n_threads), n_gpu_layers=int(n_gpu_layers)
    )
    model = Model(Path(path), options)

    def read(n_tokens: int) -> float:
        """Seconds from an empty context to the logits after `n_tokens` tokens."""
        tokens = [7919 * i % model.n_vocab for i in range(n_tokens)]
        model.clear()
        start = perf_counter()
        model.decode(tokens)
        model.logits(0)
        return perf_counter() - start

    return {"read": read}


if __name__ == "__main__":
    work(load)
