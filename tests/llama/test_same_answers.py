"""The same seed, the same answer: `Llama` against llama_cpp's own, whole responses."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swift_gguf import engine
from swift_gguf.llama import Llama
from tests.conftest import N_GPU_LAYERS
from tests.fixtures.controls import accept_drafts
from tests.llama.conftest import PlainLlama, entries, joined, without_ids
from tests.real.conftest import real as real

from llama_cpp import (  # isort: skip
    LlamaGrammar,
    LogitsProcessorList,
    StoppingCriteriaList,
)

PROMPT = "the cat sat on the mat, the cat sat on the mat, the cat sat"

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"enum": [1, 2, 3]}},
    "required": ["name", "age"],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look_up", "description": "Looks up.", "parameters": SCHEMA},
    }
]
MESSAGES = [
    {"role": "system", "content": "You are a cat."},
    {"role": "user", "content": "Where do you sit? On the mat, on the mat, on the"},
]

COMPLETIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seed": {"seed": 7},
    "hot": {"seed": 8, "temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "typical": {"seed": 9, "typical_p": 0.7, "top_k": 20},
    "the plain distribution": {"seed": 3, "temperature": -1.0},
    "penalties": {
        "seed": 1,
        "repeat_penalty": 1.3,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
    },
    "mirostat": {"seed": 2, "mirostat_mode": 1, "mirostat_tau": 3.0},
    "mirostat 2": {"seed": 2, "mirostat_mode": 2, "mirostat_eta": 0.2},
    "logit bias": {"temperature": 0.0, "logit_bias": {5: 4.0, 70: -2.0}},
    "echo": {"seed": 5, "echo": True},
    "one token": {"seed": 5, "max_tokens": 1},
    "no limit": {"seed": 6, "prompt": PROMPT * 10, "max_tokens": None},
    "logprobs": {"seed": 4, "logprobs": 3},
    "logprobs of nothing else": {"seed": 4, "logprobs": 0},
    "tokens": {"seed": 4, "prompt": [20, 21, 22, 20, 21, 22, 20, 21]},
}


@pytest.fixture(scope="module", params=[False, True], ids=["", "flash"])
def flash_attn(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def same(
    plain: PlainLlama, swift: Llama, ask: Any, *, stream: bool = False, drafts: bool = True
) -> Any:
    """Asks both, from an empty context, and returns what both say; of usage and the like, all.

    ask: called with a llama and whether to stream.  Streams are held to the whole answer:
        llama_cpp's lose characters, and wait for bytes that are none.
    """
    plain.reset()
    expected = ask(plain, False)
    swift.reset()
    swift.speculation.stats.sources.clear()
    answer = ask(swift, stream)
    if stream:
        answer = list(answer)
    else:
        assert _without_logprobs(answer) == _without_logprobs(expected)
    assert joined(answer) == joined(expected)
    if drafts:
        assert swift.speculation.stats.drafted > 0, "nothing was drafted, so nothing was shown"
    return answer


def _without_logprobs(answer: Any) -> Any:
    """Of these, `joined` has what llama_cpp is right about: it loses tokens of the same text among
    the likeliest, and the bytes of those that are no character (tests/llama/test_logprobs.py)."""
    answer = without_ids(answer)
    for choice in answer["choices"]:
        choice["logprobs"] = choice["logprobs"] and len(entries(choice["logprobs"]))
    return answer


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", COMPLETIONS)
def test_a_completion(plain: PlainLlama, swift: Llama, name: str, stream: bool) -> None:
    values = {"prompt": PROMPT, "max_tokens": 24} | COMPLETIONS[name]
    same(
        plain,
        swift,
        lambda llama, stream: llama.create_completion(stream=stream, **values),
        stream=stream,
        drafts=values["max_tokens"] != 1,
    )
    assert swift.n_tokens == plain.n_tokens


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_stop_strings(plain: PlainLlama, swift: Llama, stream: bool) -> None:
    text = plain.create_completion(PROMPT, max_tokens=30, seed=11)["choices"][0]["text"]
    stop = [text[12:15], "never said"]
    answer = same(
        plain,
        swift,
        lambda llama, stream: llama.create_completion(
            PROMPT, max_tokens=30, seed=11, stop=stop, stream=stream
        ),
        stream=stream,
    )
    assert joined(answer)["finish_reason"] == "stop"
    assert swift.n_tokens == plain.n_tokens


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_grammar(plain: PlainLlama, swift: Llama, stream: bool) -> None:
    grammar = LlamaGrammar.from_string('root ::= ("yes" | "no" | "maybe") ", "  root | "end"')
    same(
        plain,
        swift,
        lambda llama, stream: llama.create_completion(
            PROMPT, max_tokens=30, seed=3, grammar=grammar, stream=stream
        ),
        stream=stream,
    )


CHATS: dict[str, dict[str, Any]] = {
    "chat": {},
    "stop": {"stop": ["a", "e"]},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "tools": {"tools": TOOLS},
    "penalties": {"repeat_penalty": 1.2, "presence_penalty": 0.4},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", CHATS)
def test_a_chat(plain: PlainLlama, swift: Llama, name: str, stream: bool) -> None:
    same(
        plain,
        swift,
        lambda llama, stream: llama.create_chat_completion(
            MESSAGES, seed=5, max_tokens=60, stream=stream, **CHATS[name]
        ),
        stream=stream,
        drafts=name != "stop",  # after a token or two
    )


def test_tools_by_another_chat_format(
    plain: PlainLlama, swift: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    for llama in (plain, swift):
        monkeypatch.setattr(llama, "chat_format", "chatml-function-calling")
    same(
        plain,
        swift,
        lambda llama, _: llama.create_chat_completion(
            [{"role": "user", "content": "sit"}],  # the tools' prompt nearly fills the context
            seed=5,
            max_tokens=12,
            tools=TOOLS,
            tool_choice="auto",
        ),
        drafts=False,
    )


def test_processors_and_criteria_see_the_same_in_the_same_order(
    plain: PlainLlama, swift: Llama
) -> None:
    """They may have a state of their own: called ahead of time they would say something else."""

    def ask(llama: PlainLlama, _: bool) -> dict[str, Any]:
        calls: list[Any] = []

        def processor(input_ids: Any, scores: Any) -> Any:
            calls.append(("process", input_ids.tolist()))
            scores[len(calls) % 50] += 3.0  # depends on how often it was called
            return scores

        def criterion(input_ids: Any, logits: Any) -> bool:
            calls.append(("stop?", input_ids.tolist(), logits.shape))
            return len(input_ids) > 60

        answer = llama.create_completion(
            PROMPT,
            max_tokens=60,
            seed=2,
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList([criterion]),
        )
        return {**answer, "calls": calls}

    answer = same(plain, swift, ask)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert swift.n_tokens == plain.n_tokens


def test_criteria_get_the_logits_that_the_latest_token_was_drawn_from(swift: Llama) -> None:
    swift.reset()
    seen: list[int] = []

    def criterion(_: Any, logits: Any) -> bool:
        seen.append(int(np.argmax(logits)))
        return False

    tokens = swift.tokenize(PROMPT.encode())
    stream = swift.generate(tokens, temp=0.0, stopping_criteria=StoppingCriteriaList([criterion]))
    text = [token for token, _ in zip(stream, range(20), strict=False)]
    stream.close()
    assert swift.speculation.stats.accepted > 0
    assert seen[: len(text)] == text


def test_long_contexts_say_the_same_whatever_drafts(open_llama: Callable[..., Any]) -> None:
    """Where llama.cpp splits the attention of single tokens over threads."""
    always, off = open_llama(n_ctx=1024), open_llama(n_ctx=1024, speculation="off")
    prompt = [20 + i * i % 83 for i in range(700)]
    for seed in range(3):
        answers = [
            without_ids(llama.create_completion(prompt, max_tokens=60, seed=seed))
            for llama in (always, off)
        ]
        assert answers[0] == answers[1]
        assert always.speculation.stats.accepted > 0
        assert off.speculation.stats.drafted == 0


@pytest.mark.slow
def test_a_real_model(real: Callable[..., Path], open_llama: Callable[..., Any]) -> None:
    path = str(real("smollm2-135m"))
    options = {"path": path, "n_ctx": 512, "n_threads": 2, "n_threads_batch": 2}
    plain = open_llama(PlainLlama, logits_all=True, **options)
    swift = open_llama(Llama, **options)
    ask = [{"role": "user", "content": "Say this twice: red, green, blue, red, green, blue."}]
    for i, values in enumerate(
        (
            {"temperature": 0.0},
            {"seed": 3},
            {"seed": 5, "logprobs": True, "top_logprobs": 2, "repeat_penalty": 1.1},
            {"seed": 6, "tools": TOOLS},
        )
    ):
        same(
            plain,
            swift,
            lambda llama, stream, values=values: llama.create_chat_completion(
                ask, max_tokens=20, stream=stream, **values
            ),
            stream=i == 1,
        )
    assert swift.speculation.stats.accepted > 0


@pytest.mark.slow
@pytest.mark.skipif(
    N_GPU_LAYERS != 0 or platform.machine() != "x86_64", reason="kernels for x86 processors"
)
def test_weights_that_llama_cpp_alone_multiplies_otherwise_in_batches(
    real: Callable[..., Path], open_llama: Callable[..., Any]
) -> None:
    """Prompts go by llama.cpp's kernels, as in llama_cpp; verifications by those for one token."""
    path = str(real("smollm2-135m", "Q4_0"))
    options = {"path": path, "n_ctx": 256, "n_threads": 2, "n_threads_batch": 2}
    plain, swift = open_llama(PlainLlama, **options), open_llama(Llama, **options)
    for seed, prompt in enumerate(("Once upon a time", "def add(a, b):\n", "red, green, red,")):
        same(
            plain,
            swift,
            lambda llama, _, prompt=prompt, seed=seed: llama.create_completion(
                prompt, max_tokens=40, seed=seed
            ),
        )


def test_accepting_whatever_was_drafted_is_noticed(
    plain: PlainLlama, swift: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: were drafts accepted without asking the model, these tests would fail."""
    monkeypatch.setattr(engine, "choose", accept_drafts)
    with pytest.raises(AssertionError):
        same(
            plain,
            swift,
            lambda llama, _: llama.create_completion(PROMPT, max_tokens=40, temperature=0.0),
        )
