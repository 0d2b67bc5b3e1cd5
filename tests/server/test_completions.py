"""`/v1/completions` as evaluations, editors and agents use it, by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.llama import Llama
from tests.fixtures.tiny_gguf import GAP_TOKENS, VOCAB
from tests.server.conftest import Server

openai = pytest.importorskip("openai")

TEXT = "the cat sat on the mat, naïve 🙂"


@pytest.fixture(scope="module")
def starts(tiny: Callable[..., Path]) -> Iterator[Server]:
    """A base model whose vocabulary puts a start token before a text, and that fills gaps."""
    path = tiny("llama", quant="Q8_0", bos=True, gaps=True, template=None, n_ctx=2048)
    running = Server(path, "-c", 2048, "-t", 1, "--cache-ram", 0)
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture(params=["server", "starts"])
def client(request: Any) -> Any:
    """Of a model without, and of one with a start token."""
    server: Server = request.getfixturevalue(request.param)
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ids(client: Any, text: str) -> list[int]:
    root = str(client.base_url).removesuffix("v1/")
    found: Any = client.post(f"{root}tokenize", body={"content": text}, cast_to=object)
    return list(found["tokens"])


def ask(client: Any, prompt: Any, **options: Any) -> Any:
    return client.completions.create(
        model="any", prompt=prompt, temperature=0, seed=1, **options
    )  # fmt: skip


def test_texts_and_their_ids_are_scored_alike(client: Any) -> None:
    tokens = ids(client, TEXT)
    of_text = ask(client, TEXT, echo=True, logprobs=2, max_tokens=3).choices[0]
    assert of_text.text.startswith(TEXT)
    assert of_text.logprobs.token_logprobs[0] is None
    assert {len(column) for column in of_text.logprobs.model_dump().values()} == {len(tokens) + 3}
    n_scored = len(tokens) + 1  # and where the next one begins
    batch = ask(client, [tokens, tokens], echo=True, logprobs=2, max_tokens=3)
    assert [choice.index for choice in batch.choices] == [0, 1]
    for choice in batch.choices:
        assert choice.text.startswith(TEXT)
        # what follows may differ: only texts get a start token
        assert choice.logprobs.text_offset[:n_scored] == of_text.logprobs.text_offset[:n_scored]
        assert len(choice.logprobs.tokens) == len(tokens) + 3
    only = ask(client, tokens, echo=True, max_tokens=3).choices[0]
    assert (only.text, only.logprobs) == (batch.choices[0].text, None)


def test_no_tokens_at_all(client: Any) -> None:
    tokens = ids(client, TEXT)
    for stream in (False, True):
        answer = ask(client, TEXT, echo=True, logprobs=1, max_tokens=0, stream=stream)
        choices = [one.choices[0] for one in (list(answer) if stream else [answer])]
        assert "".join(choice.text for choice in choices) == TEXT
        scored = [one for c in choices if c.logprobs for one in c.logprobs.token_logprobs]
        assert len(scored) == len(tokens)
        assert choices[-1].finish_reason == "length"
    answer = ask(client, TEXT, max_tokens=0)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == ("", 0)
    assert answer.usage.prompt_tokens >= len(tokens)


def test_streams_echo(client: Any) -> None:
    for logprobs in (None, 1):
        whole = ask(client, TEXT, echo=True, logprobs=logprobs, max_tokens=9).choices[0]
        chunks = list(ask(client, TEXT, echo=True, logprobs=logprobs, max_tokens=9, stream=True))
        assert chunks[0].choices[0].text == TEXT
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
        if logprobs:
            parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
            tops = [top for part in parts for top in part.top_logprobs]
            assert tops == whole.logprobs.top_logprobs


def test_characters_can_be_put_together(client: Any) -> None:
    options: Any = {
        "model": "any", "messages": [{"role": "user", "content": "Hi"}], "logprobs": True,
        "top_logprobs": 3, "extra_body": {"grammar": 'root ::= "a🙂é"'},
    }  # fmt: skip
    content = client.chat.completions.create(**options).choices[0].logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode() == "a🙂é"
    assert all(len(one.top_logprobs) == 3 for one in content)
    chunks = client.chat.completions.create(stream=True, **options)
    streamed = [
        one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content
    ]
    assert streamed == content


def test_many_stops_and_the_first_in_the_text_wins(client: Any) -> None:
    stops = [f"never {i}" for i in range(100)]
    (token,) = (id for id, text in enumerate(VOCAB.tokens) if text == "assi")
    for stop in (["s", "a"], ["a", "s"], [*stops, "s", "a", "x" * 1000]):
        for stream in (False, True):
            answer = ask(
                client, "t", stop=stop, stream=stream, logit_bias={token: 90}, max_tokens=8,
                extra_body={"grammar": 'root ::= "x" "assi" "!"'},
            )  # fmt: skip
            parts = list(answer) if stream else [answer]
            assert "".join(part.choices[0].text for part in parts) == "x"
            assert parts[-1].choices[0].finish_reason == "stop"


def test_the_text_of_the_end_token_ends_nothing(client: Any) -> None:
    word = 'a <|im_end|> "</s>" b'
    options: Any = {
        "model": "any", "messages": [{"role": "user", "content": "Hi"}],
        "extra_body": {"grammar": f"root ::= {json.dumps(word)}"},
    }  # fmt: skip
    answer = client.chat.completions.create(**options).choices[0]
    chunks = list(client.chat.completions.create(stream=True, **options))
    assert answer.finish_reason == "stop"
    assert answer.message.content == word
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == word


def test_a_gap(server: Server, starts: Server) -> None:
    before, after = "def f(", "):\n    return 1"
    body = {"prompt": before, "suffix": after, "max_tokens": 6, "temperature": 0}
    status, answer = starts.post("/v1/completions", body)
    assert status == 200
    parts = [starts.post("/tokenize", {"content": text})[1]["tokens"] for text in (before, after)]
    pre, suf, mid = GAP_TOKENS
    prompt = [VOCAB.endoftext, pre, *parts[0], suf, *parts[1], mid]
    _, expected = starts.post("/v1/completions", {**body, "prompt": prompt, "suffix": ""})
    assert answer["choices"] == expected["choices"]
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    status, told = server.post("/v1/completions", body)
    assert (status, told["error"]["param"]) == (400, "suffix")
    assert "FIM" in told["error"]["message"]


def test_one_start_token(server: Server, starts: Server) -> None:
    for text, n in (("a b", 1), ("<|endoftext|>a b", 1)):
        tokens = starts.post("/tokenize", {"content": text, "add_special": True})[1]["tokens"]
        assert tokens.count(VOCAB.endoftext) == n
        body = {"prompt": text, "max_tokens": 1}
        assert starts.post("/v1/completions", body)[1]["usage"]["prompt_tokens"] == len(tokens)
    body = {"messages": [{"role": "user", "content": "Name a river."}], "max_tokens": 1}
    used = [one.post("/v1/chat/completions", body)[1]["usage"]["prompt_tokens"]
            for one in (server, starts)]  # fmt: skip
    assert used[1] == used[0] + 1
    assert not any("RuntimeWarning" in line for line in starts.log)


def test_a_base_model_is_told_of_once(server: Server, starts: Server) -> None:
    assert sum("no chat template" in line for line in starts.log) == 1
    assert "im_start" in starts.get("/props")[1]["chat_template"]
    assert not any("no chat template" in line for line in server.log)


@pytest.mark.parametrize("seed", [1, 2**32 - 1, 2**32 + 42, 2**53, -3])
def test_seeds_of_any_size_repeat(server: Server, seed: int) -> None:
    def say(seed: int, **fields: Any) -> list[str]:
        body = {"prompt": "a", "max_tokens": 24, "seed": seed, "temperature": 1, **fields}
        return [c["text"] for c in server.post("/v1/completions", body)[1]["choices"]]

    first = say(seed)
    assert say(seed) == say(seed + 2**32) == first
    assert say(seed - 1, n=3)[1:] == first + say(seed + 1)
    assert seed == 2**53 or say(0) != first


def test_the_server_and_the_class_draw_alike(server: Server, model: Path) -> None:
    llama = Llama(str(model), n_ctx=512, n_threads=1, verbose=False, flash_attn=None)
    body: Any = {"prompt": "a b c", "max_tokens": 24, "seed": 2**32 - 2, "temperature": 1.0}
    expected = llama.create_completion(**body)["choices"][0]["text"]
    llama.close()
    assert server.post("/v1/completions", body)[1]["choices"][0]["text"] == expected
