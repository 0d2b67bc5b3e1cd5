"""Limits, samplers and rollback on a real model."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from swift_gguf.drafting import LayerSkip
from swift_gguf.engine import generate
from swift_gguf.errors import ContextFullError, GrammarError
from swift_gguf.model import Model, ModelOptions
from swift_gguf.sampling.sampling import Sampler, SamplingOptions
from swift_gguf.stats import Stats
from swift_gguf.text.text import StreamDecoder, encode
from tests.conftest import N_GPU_LAYERS
from tests.real.same_text import GREEDY, chat_tokens, decode, light_skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smol(real: Callable[..., Path]) -> Iterator[Model]:
    options = ModelOptions(n_ctx=320, n_gpu_layers=N_GPU_LAYERS)
    with Model(real("smollm2-135m"), options) as model:
        yield model


def test_context_filled_to_the_brim(smol: Model) -> None:
    prompt = encode(smol, "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,")  # a series has no end
    results = []
    for subnetwork in (None, light_skip(smol)):
        tokens, stats = decode(smol, prompt, subnetwork=subnetwork, max_tokens=999)
        assert stats.stop_reason == "context"
        assert smol.n_past == smol.n_ctx
        # the last token is sampled from a full context, and needs no cell itself
        assert len(tokens) == smol.n_ctx - len(prompt) + 1
        results.append(tokens)
    assert results[0] == results[1]


def test_a_prompt_that_does_not_fit_is_refused(smol: Model) -> None:
    smol.clear()
    with pytest.raises(ContextFullError, match="ctx-size"):
        decode(smol, [1] * (smol.n_ctx + 1))
    assert smol.n_past == 0
    tokens, stats = decode(smol, [1] * smol.n_ctx)
    assert len(tokens) == 1
    assert stats.stop_reason == "context"


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=0, repeat_penalty=1.3),
        SamplingOptions(temperature=1.2, top_k=0, top_p=1.0, min_p=0.0, seed=5),
        SamplingOptions(temperature=0.7, presence_penalty=0.5, frequency_penalty=0.5, seed=6),
        SamplingOptions(temperature=0.9, grammar='root ::= ("yes" | "no") "." [a-z ]*', seed=7),
        SamplingOptions(temperature=0.8, repeat_penalty=1.1, repeat_last_n=-1, seed=8),
    ],
    ids=["repeat penalty", "hot", "penalties", "grammar", "penalise all"],
)
def test_every_sampler_gives_plain_text(smol: Model, options: SamplingOptions) -> None:
    prompt = chat_tokens(smol, "Is the sea salty?")
    plain, _ = decode(smol, prompt, sampling=options)
    speculative, stats = decode(smol, prompt, sampling=options, subnetwork=light_skip(smol))
    assert stats.drafted > 0
    if N_GPU_LAYERS == 0:
        assert speculative == plain


def test_options_have_an_effect(smol: Model) -> None:
    prompt = chat_tokens(smol, "Tell me about whales.")
    greedy, _ = decode(smol, prompt)
    penalised, _ = decode(smol, prompt, sampling=SamplingOptions(temperature=0, repeat_penalty=1.8))
    one, _ = decode(smol, prompt, sampling=SamplingOptions(seed=1))
    again, _ = decode(smol, prompt, sampling=SamplingOptions(seed=1))
    two, _ = decode(smol, prompt, sampling=SamplingOptions(seed=2))
    only_one, _ = decode(smol, prompt, sampling=SamplingOptions(temperature=2, top_k=1, seed=3))
    assert one == again
    assert len({tuple(tokens) for tokens in (greedy, penalised, one, two)}) == 4
    assert only_one == greedy
    digits, _ = decode(smol, prompt, sampling=SamplingOptions(grammar="root ::= [0-9]+", seed=1))
    decoder = StreamDecoder(smol)
    assert "".join(map(decoder.feed, digits)).isdigit()


def test_a_bad_grammar_is_one_clear_error(smol: Model) -> None:
    with pytest.raises(GrammarError, match="root"):
        Sampler(smol, SamplingOptions(grammar="rootless ::= [a-z]"))
    with pytest.raises(GrammarError, match="unexpected end"):
        Sampler(smol, SamplingOptions(grammar="root ::= ["))


@pytest.mark.parametrize("stop_after", [1, 2, 5, 17])
def test_a_consumer_that_stops_leaves_plain_state(smol: Model, stop_after: int) -> None:
    """After an early stop the context is plain's, to the bit."""
    prompt = chat_tokens(smol, "Count from one to twenty.")
    logits = []
    for drafter in (None, LayerSkip(smol, light_skip(smol))):
        smol.clear()
        with Sampler(smol, GREEDY) as sampler:
            stream = generate(smol, prompt, sampler=sampler, drafter=drafter, draft_max=6)
            tokens = [next(stream).id for _ in range(stop_after)]
            stream.close()
        assert smol.tokens == prompt + tokens[:-1]
        smol.decode(tokens[-1:])
        logits.append(smol.logits(0))
    if N_GPU_LAYERS == 0:
        np.testing.assert_array_equal(*logits)


def test_a_second_prompt_decodes_only_what_is_new(smol: Model) -> None:
    first = chat_tokens(smol, "Who are you?")
    tokens, _ = decode(smol, first, max_tokens=8)
    second = first + tokens + encode(smol, " And then?")
    stats = Stats()
    with Sampler(smol, GREEDY) as sampler:
        list(generate(smol, second, sampler=sampler, max_tokens=1, stats=stats))
    assert stats.prompt_n == len(second) - len(first) - len(tokens) + 1


def test_an_interrupt_inside_a_decode_leaves_the_context_usable(smol: Model) -> None:
    """Ctrl-C arrives while llama.cpp works, and is raised when it has already stored the tokens."""
    smol.clear()
    smol.decode([1, 2, 3])
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()

    def decode_until_interrupted() -> None:
        for _ in range(50):
            smol.decode(range(100, 350))
            smol.rollback(3)

    with pytest.raises(KeyboardInterrupt):
        decode_until_interrupted()
    timer.join()
    assert smol.tokens == [1, 2, 3]
    smol.decode([7])
    interrupted = smol.logits(0)
    smol.clear()
    smol.decode([1, 2, 3])
    smol.decode([7])
    np.testing.assert_array_equal(smol.logits(0), interrupted)


def test_text_round_trips(smol: Model) -> None:
    for text in ("Héllo wörld 漢字 🙂\n", "  two  spaces", "<|im_start|>"):
        decoder = StreamDecoder(smol)
        tokens = encode(smol, text, special=False)
        assert "".join(map(decoder.feed, tokens)) + decoder.finish() == text
