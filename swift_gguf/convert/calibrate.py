"""Computes an importance matrix from the converted model's own answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from swift_gguf.convert.imatrix import Collector
from swift_gguf.convert.steps import Report
from swift_gguf.engine import generate
from swift_gguf.errors import ConvertError
from swift_gguf.model import Model, ModelOptions
from swift_gguf.native.convert import ProductWatch
from swift_gguf.prepare.calibration import TEMPERATURE, answer
from swift_gguf.prepare.prompts import PROMPTS
from swift_gguf.prepare.texts import Text, load_texts, save_texts
from swift_gguf.sampling import Sampler, SamplingOptions
from swift_gguf.text import encode, render_chat

ANSWER_TOKENS = 96
CONTEXT, BATCH = 2048, 128
SEED = 1


def options(n_threads: int | None, watch: ProductWatch | None = None) -> ModelOptions:
    """The options that every step here loads the model with."""
    return ModelOptions(
        n_ctx=CONTEXT,
        holds_several=True,
        n_batch=BATCH,
        n_threads=n_threads,
        sidecar=None,
        watch=watch,
    )


def answers(
    model: Model,
    kept: Path,
    *,
    key: str,
    n_tokens: int,
    report: Report = lambda *_: None,
) -> list[Text]:
    """The model's own answers to built-in prompts, `n_tokens` in all.

    kept: the file that stores the answers, so that an interrupted run can resume.
    key: identifies the model; stored answers with another key are ignored.
    """
    prompts = [_encoded(model, prompt) for prompt in PROMPTS]
    texts = load_texts(kept, key)
    done = sum(text.n_tokens for text in texts)
    while done < n_tokens:
        prompt = prompts[len(texts) % len(prompts)]
        texts.append(_answered(model, prompt, seed=SEED + len(texts)))
        done += texts[-1].n_tokens
        save_texts(kept, key, texts)
        report("answering", min(done, n_tokens), n_tokens, "tokens")
    return texts


def _encoded(model: Model, prompt: str) -> list[int]:
    if model.metadata("tokenizer.chat_template") is not None:
        prompt = render_chat(model, [{"role": "user", "content": prompt}])
    return encode(model, prompt)[: CONTEXT // 4]


def _answered(model: Model, prompt: Sequence[int], *, seed: int) -> Text:
    if not model.rollback_refusal:
        rng = np.random.default_rng(seed)
        return answer(model, prompt, n_tokens=ANSWER_TOKENS, rng=rng)
    model.clear()  # a context without rollback cannot branch either
    sampling = SamplingOptions(temperature=TEMPERATURE, seed=seed)
    with Sampler(model, sampling, prompt=prompt) as sampler:
        drawn = generate(model, prompt, sampler=sampler, max_tokens=ANSWER_TOKENS)
        tokens = [token.id for token in drawn]
    return Text(prompt=prompt, answers=[tokens])


def _replay(model: Model, texts: Sequence[Text], what: str, report: Report) -> Iterator[None]:
    """Decodes each prompt with its answer; all tokens get outputs, so the last layer sees them."""
    for number, text in enumerate(texts):
        for tokens in text.answers:
            model.clear()
            whole = [*text.prompt, *tokens]
            for start in range(0, len(whole), BATCH):
                piece = whole[start : start + BATCH]
                model.decode(piece, n_outputs=len(piece), exact=False)
            yield
        report(what, number + 1, len(texts), "texts")
    model.clear()


def collect(
    path: Path, texts: Sequence[Text], *, n_threads: int | None = None, report: Report
) -> Collector:
    """Collects the activations that each weight of the model at `path` is multiplied by."""
    collector = Collector()
    watch = ProductWatch(collector)
    with Model(path, options(n_threads, watch)) as model:
        for _ in _replay(model, texts, "weighing columns", report):
            if watch.failure:
                raise watch.failure
    if not collector.usage:
        raise ConvertError("this model's matrix products cannot be observed; leave out --imatrix")
    return collector
