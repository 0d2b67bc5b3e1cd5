"""Answers to requests for embeddings."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from swift_gguf.errors import ContextFullError
from swift_gguf.server.errors import bad_request, one_line
from swift_gguf.server.options import ServerOptions
from swift_gguf.server.requests import EmbeddingRequest
from swift_gguf.server.served import ServedLlama, Work
from swift_gguf.server.worker import Job


def embed(request: EmbeddingRequest, options: ServerOptions) -> Work:
    """Yields the response to POST /v1/embeddings."""

    def work(llama: ServedLlama, job: Job[ServedLlama]) -> Iterator[object]:
        embedder = llama.embedder()
        if request.dimensions not in (None, llama.n_embd()):
            raise bad_request(
                f"this model's embeddings have {llama.n_embd()} dimensions", param="dimensions"
            )
        texts = [_tokens(text, llama, embedder.n_max) for text in request.inputs]
        data = []
        for index, tokens in enumerate(texts):
            job.check()
            vector = embedder.embed(tokens)
            data.append({"object": "embedding", "index": index, "embedding": _encoded(vector)})
        n_tokens = sum(map(len, texts))
        yield {
            "object": "list",
            "data": data,
            "model": options.alias,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }

    def _encoded(vector: NDArray[np.float32]) -> list[float] | str:
        if request.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
        return [float(x) for x in vector]

    return work


def _tokens(text: str | list[int], llama: ServedLlama, n_max: int) -> list[int]:
    if isinstance(text, str):
        try:
            tokens: list[int] = llama.tokenize(text.encode("utf-8"), add_bos=True)
        except UnicodeEncodeError:
            raise bad_request("a lone surrogate is not a character", param="input") from None
        except ContextFullError as error:
            raise bad_request(one_line(error), param="input") from error
    else:
        tokens = text
        if any(token >= llama.n_vocab() for token in tokens):
            raise bad_request("a token id is not in the vocabulary", param="input")
    if not 0 < len(tokens) <= n_max:
        raise bad_request(
            f"a text has {len(tokens)} tokens; it must have 1 to {n_max}", param="input"
        )
    return tokens
