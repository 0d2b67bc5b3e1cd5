"""What llama-cpp-python's own high-level tests ask of a `Llama`, asked of a `Llama`.

Its tests are of models from the net; here they run on generated ones of the same kinds, and on a
real one at the end.  What a model says is compared with what a fresh one says.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swift_gguf.llama import Llama
from tests.conftest import N_GPU_LAYERS
from tests.real.conftest import real as real

import llama_cpp  # isort: skip

PROMPT = "The quick brown fox"
KINDS = {"llama": (False, False), "mamba": (True, False), "lfm2": (False, True)}
"""Families: is it recurrent, is it a mixture of recurrent and attention layers."""

Make = Callable[..., Llama]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tiny: Callable[..., Path], open_llama: Make) -> Make:
    path = str(tiny(request.param, quant="Q8_0"))

    def make_(**options: Any) -> Llama:
        llama = open_llama(
            path=path,
            n_ctx=64,
            n_batch=64,
            n_ubatch=64,
            n_threads=multiprocessing.cpu_count(),
            n_threads_batch=multiprocessing.cpu_count(),
            logits_all=False,
            speculation="auto" if any(KINDS[request.param]) else "ngram,recycling,layer-skip",
            **options,
        )
        assert (llama._is_recurrent, llama._is_hybrid) == KINDS[request.param]
        return llama

    return make_


def tokens_of(llama: Llama, text: str = PROMPT) -> list[int]:
    return llama.tokenize(text.encode(), add_bos=True, special=True)


def first(llama: Llama, tokens: list[int], n: int = 3) -> list[int]:
    return list(itertools.islice(llama.generate(tokens, temp=0.0), n))


def watched(monkeypatch: pytest.MonkeyPatch, llama: Llama, name: str) -> list[Any]:
    """Calls of a method, which grow."""
    calls: list[Any] = []
    method = getattr(llama, name)

    def call(*args: Any) -> Any:
        calls.append(args)
        return method(*args)

    monkeypatch.setattr(llama, name, call)
    return calls


def test_tokenization(open_llama: Make, tiny_path: str) -> None:
    llama = open_llama(vocab_only=True, speculation="off")
    assert llama._ctx.ctx is not None
    tokens = llama.tokenize(b"Hello world", add_bos=False)
    assert llama.detokenize(tokens) == b"Hello world"
    marked = llama.tokenize(b"Hello world<|im_end|>", add_bos=False)
    assert marked[-1] != llama.token_eos()
    special = llama.tokenize(b"Hello world<|im_end|>", add_bos=False, special=True)
    assert special == [*tokens, llama.token_eos()]
    assert llama.tokenize(b"", add_bos=False) == []
    assert llama.detokenize([]) == b""


def test_a_prompt_that_changes_in_its_middle(make: Make) -> None:
    llama = make()
    prompts = PROMPT, "The slow brown fox"
    tokens = [tokens_of(llama, prompt) for prompt in prompts]
    assert tokens[0] != tokens[1]
    assert tokens[0][0] == tokens[1][0]
    answers = [llama.create_completion(p, max_tokens=1, temperature=0.0) for p in prompts]
    expected = [make().create_completion(p, max_tokens=1, temperature=0.0) for p in prompts]
    assert [a["choices"] for a in answers] == [e["choices"] for e in expected]


def test_a_prompt_that_was_evaluated_is_not_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, llama = make(), make()
    tokens = tokens_of(fresh)
    expected = first(fresh, tokens)
    llama.eval(tokens)
    assert llama.n_tokens == len(tokens)
    assert llama.input_ids[: llama.n_tokens].tolist() == tokens
    assert llama.sample(temp=0.0, idx=len(tokens) - 1) == expected[0]
    resets = watched(monkeypatch, llama, "reset")
    assert first(llama, tokens) == expected
    assert not resets
    assert llama.n_tokens == len(tokens) + len(expected) - 1


def test_a_loaded_state_goes_on_as_a_fresh_prompt(make: Make) -> None:
    fresh, source, llama = make(), make(), make()
    tokens = tokens_of(fresh)
    expected = first(fresh, tokens)
    source.eval(tokens)
    state = source.save_state()
    for last in range(20):  # something as long that goes on otherwise
        llama.reset()
        llama.eval([*tokens[:-1], last])
        if llama.sample(temp=0.0, idx=len(tokens) - 1) != expected[0]:
            break
    llama.load_state(state)
    assert llama.n_tokens == len(tokens)
    assert llama.input_ids[: llama.n_tokens].tolist() == tokens
    assert first(llama, tokens) == expected
    assert llama.n_tokens == len(tokens) + len(expected) - 1


def test_a_prompt_out_of_the_cache(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, writer, reader = make(), make(), make()
    tokens = tokens_of(fresh)
    values: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "seed": 1337}
    expected = fresh.create_completion(tokens, **values)
    cache = llama_cpp.LlamaRAMCache()
    writer.set_cache(cache)
    writer.create_completion(tokens, **values)
    reader.set_cache(cache)
    loads = watched(monkeypatch, reader, "load_state")
    answer = reader.create_completion(tokens, **values)
    assert len(loads) == 1
    assert (answer["choices"], answer["usage"]) == (expected["choices"], expected["usage"])


def test_a_shorter_prompt_than_what_was_evaluated(make: Make) -> None:
    fresh, llama = make(), make()
    tokens = tokens_of(fresh)
    expected = first(fresh, tokens)
    more = llama.tokenize(b" jumps over the lazy dog", add_bos=False)
    llama.eval(tokens + more)
    assert llama.n_tokens > len(tokens)
    assert first(llama, tokens) == expected


def test_embeddings(make: Make) -> None:
    llama = make(embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN)
    texts = ["Hello World", "A different prompt"]
    alone = [llama.embed(text) for text in texts]
    together = llama.embed(texts)
    assert len(together) == 2
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4)
    assert len(llama.embed(texts[::-1])) == 2


@pytest.mark.slow
def test_a_real_model(real: Callable[..., Path], open_llama: Make) -> None:
    """Completion, grammar, logits processor, and random numbers that a state brings back."""
    llama = open_llama(
        path=str(real("smollm2-135m", "Q8_0")),
        n_ctx=64,
        n_batch=32,
        n_threads=multiprocessing.cpu_count(),
        n_gpu_layers=N_GPU_LAYERS,
    )

    def say(prompt: str, **values: Any) -> str:
        options = {"max_tokens": 6, "top_k": 50, "top_p": 0.9, "temperature": 0.8} | values
        text: str = llama.create_completion(prompt, **options)["choices"][0]["text"]
        return text

    count = "One, two, three, four, five, six, seven,"
    for _ in range(2):  # the second time, the context holds the prompt
        assert say(count, temperature=0.0, seed=1337).startswith(" eight, nine")
    yes_or_no = llama_cpp.LlamaGrammar.from_string('root ::= "true" | "false"')
    assert say("Paris is in France, true or false? ", grammar=yes_or_no) in ("true", "false")

    wanted = llama.tokenize(b"rot", add_bos=False)

    def only(_: Any, logits: Any) -> Any:
        logits[wanted[0]] += 1000.0
        return logits

    answer = say("The capital is par", logits_processor=llama_cpp.LogitsProcessorList([only]))
    assert answer.startswith("rot")

    numbers = llama_cpp.LlamaGrammar.from_string("root ::= [1-9] [0-9] [0-9] [0-9]")
    llama.set_seed(1337)
    state = llama.save_state()
    ask = "Pick a number of four digits: "
    one, two = (say(ask, temperature=1.5, grammar=numbers) for _ in range(2))
    llama.load_state(state)
    assert say(ask, temperature=1.5, grammar=numbers) == one != two
