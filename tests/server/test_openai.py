"""The server under the real `openai` client, and what it answers against what the model says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swift_gguf.llama import Llama
from tests.server.conftest import Server

openai = pytest.importorskip("openai", reason="the package openai is not installed")

HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer"},
            },
            "required": ["city", "days"],
        },
    },
}


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def llama(model: Path) -> Iterator[Llama]:
    """The same model in this process."""
    llama = Llama(str(model), n_ctx=4096, n_threads=1, flash_attn=None, verbose=False)
    yield llama
    llama.close()


def joined(chunks: Any) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_same_text_as_in_process(client: Any, llama: Llama, temperature: float) -> None:
    options: Any = {"messages": HELLO, "max_tokens": 60, "temperature": temperature, "seed": 7}
    expected = llama.create_chat_completion(**options)["choices"][0]
    whole = client.chat.completions.create(model="tiny", **options)
    assert whole.choices[0].message.content == expected["message"]["content"]
    assert whole.choices[0].finish_reason == expected["finish_reason"]
    chunks = list(client.chat.completions.create(model="tiny", stream=True, **options))
    assert joined(chunks) == expected["message"]["content"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == expected["finish_reason"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_completions_are_the_same_too(client: Any, llama: Llama) -> None:
    options: Any = {"prompt": "Once upon", "max_tokens": 40, "temperature": 0.8, "seed": 3}
    expected = llama.create_completion(**options)["choices"][0]["text"]
    assert client.completions.create(model="tiny", **options).choices[0].text == expected
    chunks = client.completions.create(model="tiny", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_prompts_of_several_kinds(client: Any, llama: Llama) -> None:
    ids = llama.tokenize(b"Once upon", add_bos=False, special=True)
    options: Any = {"model": "tiny", "max_tokens": 8, "temperature": 0, "seed": 1}
    text = client.completions.create(prompt="Once upon", **options).choices[0].text
    assert client.completions.create(prompt=ids, **options).choices[0].text == text
    both = client.completions.create(prompt=["Once upon", "A"], n=2, **options)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [both.choices[0].text, both.choices[1].text] == [text, text]
    assert client.completions.create(prompt="Once upon", echo=True, **options).choices[0].text == (
        f"Once upon{text}"
    )
    assert client.completions.create(prompt="", **options).usage.prompt_tokens == 1


def test_usage_and_timings(client: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=20, seed=5)
    usage, timings = answer.usage, answer.timings
    assert usage.completion_tokens == 20
    assert usage.total_tokens == usage.prompt_tokens + 20
    assert timings["prompt_n"] + timings["cache_n"] == usage.prompt_tokens
    assert timings["predicted_n"] == 20
    # llama-server's: the first token comes with the prompt
    rate = 19 / (timings["predicted_ms"] / 1e3)
    assert timings["predicted_per_second"] == pytest.approx(rate)
    assert timings["predicted_per_token_ms"] == pytest.approx(1e3 / rate)
    assert timings["draft_n"] >= timings["draft_n_accepted"] >= 0
    assert timings["predicted_ms"] > 0

    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=20, seed=5, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 20
    assert chunks[-1].usage.prompt_tokens == usage.prompt_tokens
    assert chunks[-2].timings["predicted_n"] == 20
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the prompt is there already


def test_several_choices(client: Any) -> None:
    options: Any = {
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 12,
        "temperature": 1,
        "seed": 9,
    }
    three = client.chat.completions.create(n=3, **options)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert client.chat.completions.create(**options).choices[0].message.content == texts[0]
    assert three.usage.completion_tokens == 36
    chunks = list(client.chat.completions.create(n=3, stream=True, **options))
    for i, text in enumerate(texts):
        assert joined(c for c in chunks if c.choices[0].index == i) == text


def test_answers_without_a_seed_differ(client: Any) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 1}
    assert len({str(client.chat.completions.create(**options).choices) for _ in range(4)}) > 1


def test_stop(client: Any) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 60, "temperature": 0}
    text = client.chat.completions.create(**options).choices[0].message.content
    stop = text[10:13]
    stopped = client.chat.completions.create(stop=[stop], **options).choices[0]
    assert stopped.message.content == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    streamed = joined(client.chat.completions.create(stop=stop, stream=True, **options))
    assert streamed == stopped.message.content


def test_logprobs(client: Any) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 5, "temperature": 0}
    answer = client.chat.completions.create(logprobs=True, top_logprobs=3, **options)
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    for item in content:
        assert item.logprob <= 0
        assert item.logprob == max(top.logprob for top in item.top_logprobs)  # greedy
        assert len(item.top_logprobs) == 3
    assert (
        len(client.chat.completions.create(logprobs=True, **options).choices[0].logprobs.content)
        == 5
    )
    chunks = client.chat.completions.create(logprobs=True, top_logprobs=3, stream=True, **options)
    streamed = [c.choices[0].logprobs.content[0] for c in chunks if c.choices[0].logprobs]
    assert [item.logprob for item in streamed] == pytest.approx([item.logprob for item in content])
    old = client.completions.create(
        model="tiny", prompt="a", max_tokens=3, logprobs=2, temperature=0
    )
    assert len(old.choices[0].logprobs.token_logprobs) == 3


def test_json(client: Any) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 400, "seed": 4}
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    found = json.loads(
        client.chat.completions.create(response_format=wanted, **options).choices[0].message.content
    )
    assert found.keys() == {"name", "ok"}
    chunks = client.chat.completions.create(response_format=wanted, stream=True, **options)
    assert json.loads(joined(chunks)).keys() == {"name", "ok"}
    text = client.chat.completions.create(
        response_format={"type": "json_object"}, **options
    ).choices[0].message.content  # fmt: skip
    assert text.startswith("{")


def test_grammar(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, extra_body={"grammar": 'root ::= "yes" | "no"'}
    )
    assert answer.choices[0].message.content in ("yes", "no")


def test_a_tool_that_must_be_called(client: Any) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    options: Any = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "seed": 4,
                    "max_tokens": 400}  # fmt: skip
    for tool_choice in (choice, "required"):
        answer = client.chat.completions.create(tool_choice=tool_choice, **options).choices[0]
        (call,) = answer.message.tool_calls
        assert answer.finish_reason == "tool_calls"
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments).keys() == {"city", "days"}
    names, arguments = [], ""
    for chunk in client.chat.completions.create(tool_choice=choice, stream=True, **options):
        for part in chunk.choices[0].delta.tool_calls or ():
            names.append(part.function.name)
            arguments += part.function.arguments or ""
    assert [name for name in names if name] == ["get_weather"]
    assert arguments == call.function.arguments


def test_a_tool_that_may_be_called(client: Any) -> None:
    for tool_choice in ("auto", "none"):
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, tools=[WEATHER], tool_choice=tool_choice, max_tokens=8
        ).choices[0]
        assert answer.message.tool_calls is None
        assert answer.message.content
    with pytest.raises(openai.BadRequestError, match="not one of the tools"):
        client.chat.completions.create(
            model="tiny", messages=HELLO, tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "no_such_tool"}},
        )  # fmt: skip


def test_a_model_that_calls_a_tool(client: Any) -> None:
    """A grammar makes this one do what others have learned."""
    call = json.dumps({"name": "get_weather", "arguments": {"city": "Ulm"}})
    said = f"<think>Hm.</think>I look. <tool_call>{call}</tool_call>"
    grammar = {"grammar": f"root ::= {json.dumps(said)}"}
    options: Any = {"model": "tiny", "tools": [WEATHER], "extra_body": grammar}
    answer = client.chat.completions.create(messages=HELLO, **options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content == "I look."
    assert answer.message.reasoning_content == "Hm."
    (made,) = answer.message.tool_calls
    assert json.loads(made.function.arguments) == {"city": "Ulm"}

    chunks = list(client.chat.completions.create(messages=HELLO, stream=True, **options))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "Hm."
    assert joined(chunks).strip() == "I look."
    (streamed,) = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    assert streamed.function.arguments == made.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"

    turns = [*HELLO, answer.message.model_dump(exclude_none=True),
             {"role": "tool", "tool_call_id": made.id, "content": "rain"}]  # fmt: skip
    after = client.chat.completions.create(messages=turns, model="tiny", max_tokens=4)
    assert after.choices[0].message.content


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.city }})"
    "{% endfor %};{% endfor %}<think>"
)


def test_a_template_of_ones_own(serve: Callable[..., Server], model: Path, tmp_path: Path) -> None:
    """It opens the model's thoughts, too; and sees a call's arguments as an object."""
    (tmp_path / "template").write_text(TEMPLATE)
    flags = ("-c", 512, "-t", 1, "--chat-template", tmp_path / "template")
    server = serve(model, *flags).wait_until_ready()
    assert server.get("/props")[1]["chat_template"] == TEMPLATE
    call = {"function": {"name": "get_weather", "arguments": '{"city": "Ulm"}'}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "rain"}]
    body = {"messages": turns, "max_tokens": 8, "temperature": 0}
    _, chat = server.post("/v1/chat/completions", body)
    prompt = server.post(
        "/tokenize", {"content": "assistant: get_weather(Ulm);tool: rain;<think>"}
    )[1]["tokens"]
    _, plain = server.post("/v1/completions", {**body, "prompt": prompt})
    message = chat["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning_content"].strip() == plain["choices"][0]["text"].strip()
    assert chat["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    events = server.request("POST", "/v1/chat/completions", {**body, "stream": True})[2]
    assert b"reasoning_content" in events


def test_a_template_that_joins_arguments(serve: Callable[..., Server], model: Path) -> None:
    template = (
        "{% for c in messages[0].tool_calls %}{{ c['function']['arguments'] + '!' }}{% endfor %}"
    )
    server = serve(model, "-c", 512, "-t", 1, "--chat-template", template).wait_until_ready()
    call = {"function": {"name": "get_weather", "arguments": '{"city": "Ulm"}'}}
    body = {"messages": [{"role": "assistant", "tool_calls": [call]}], "max_tokens": 1}
    status, chat = server.post("/v1/chat/completions", body)
    text = '{"city": "Ulm"}!'
    tokens = server.post("/tokenize", {"content": text})[1]["tokens"]
    assert (status, chat["usage"]["prompt_tokens"]) == (200, len(tokens))


def test_penalties_of_all_that_was_said(serve: Callable[..., Server], model: Path) -> None:
    server = serve(model, "-c", 512, "-t", 1, "--repeat-last-n", -1).wait_until_ready()
    options: Any = {"prompt": "a", "max_tokens": 150, "temperature": 0, "repeat_penalty": 1.5}
    found = server.post("/v1/completions", options)[1]["choices"][0]["text"]
    texts = []
    for n in (512, 64, 0):
        llama = Llama(
            str(model), n_ctx=512, n_threads=1, flash_attn=None, verbose=False, last_n_tokens_size=n
        )
        texts.append(llama.create_completion(**options)["choices"][0]["text"])
        llama.close()
    assert found == texts[0]
    assert found not in texts[1:]
    for n, text in zip((-1, 512, 64, 0), [texts[0], *texts], strict=True):  # a request's own
        told = server.post("/v1/completions", options | {"repeat_last_n": n})[1]
        assert told["choices"][0]["text"] == text
    assert server.post("/v1/completions", options)[1]["choices"][0]["text"] == found


def test_embeddings(client: Any) -> None:
    texts = ["a small cat", "a small dog", "tax law"]
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    packed = client.embeddings.create(model="tiny", input=texts)  # the client asks for base64
    vectors = [np.array(item.embedding) for item in plain.data]
    for vector, item in zip(vectors, packed.data, strict=True):
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(vector, item.embedding, atol=1e-6)
    assert not np.allclose(vectors[0], vectors[2])
    again = client.embeddings.create(model="tiny", input=texts[0], encoding_format="float")
    np.testing.assert_allclose(again.data[0].embedding, vectors[0], atol=1e-6)
    assert plain.usage.total_tokens > 3
    many = client.embeddings.create(model="tiny", input=["a"] * 200)
    assert [item.index for item in many.data] == list(range(200))


def test_models(client: Any) -> None:
    (card,) = client.models.list().data
    assert card.id == "tiny"
    assert card.meta["n_ctx"] == 4096
    assert client.models.retrieve("tiny") == card
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("some/other")


def test_errors_as_the_client_knows_them(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "word " * 9000}], stream=True
        )
    assert caught.value.code == "context_length_exceeded"


def test_a_wrong_key(serve: Callable[..., Server], model: Path) -> None:
    server = serve(model, "-c", 512, "-t", 1, "--api-key", "right").wait_until_ready()
    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert openai.OpenAI(base_url=f"{server.url}/v1", api_key="right").models.list().data


def test_roles_and_parts_that_templates_do_not_know(client: Any) -> None:
    plain = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=8, temperature=0
    ).choices[0].message.content  # fmt: skip
    parts: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}],
        },
    ]
    same = client.chat.completions.create(model="tiny", messages=parts, max_tokens=8, temperature=0)
    assert same.choices[0].message.content == plain


def test_tokens(server: Server) -> None:
    text = "naïve 東京 🙂 <|im_end|>"
    _, body = server.post("/tokenize", {"content": text})
    assert server.post("/detokenize", body) == (200, {"content": text})
    _, body = server.post("/tokenize", {"content": "🙂", "with_pieces": True})
    pieces = b"".join(
        bytes(item["piece"]) if isinstance(item["piece"], list) else item["piece"].encode()
        for item in body["tokens"]
    )
    assert pieces.decode() == "🙂"


def test_what_the_model_is(server: Server) -> None:
    _, props = server.get("/props")
    assert props["default_generation_settings"]["n_ctx"] == 4096
    assert props["speculation"]["why"]
    assert "im_start" in props["chat_template"]
    assert "/" not in props["model_alias"]


def test_metrics_count(server: Server, client: Any) -> None:
    names = [
        "prompt_tokens_total",
        "tokens_predicted_total",
        "n_decode_total",
        "n_drafted_total",
        "n_drafted_accepted_total",
    ]
    before = {name: server.metric(f"llamacpp:{name}") for name in names}
    timings = client.completions.create(model="tiny", prompt="abc " * 9, max_tokens=30).timings
    after = {name: server.metric(f"llamacpp:{name}") for name in names}
    grown = {name: after[name] - before[name] for name in names}
    assert grown["tokens_predicted_total"] == timings["predicted_n"]
    assert grown["prompt_tokens_total"] == timings["prompt_n"]
    assert grown["n_drafted_total"] == timings["draft_n"]
    assert grown["n_drafted_accepted_total"] == timings["draft_n_accepted"]
    assert grown["n_decode_total"] > 0
    assert server.metric("swift_gguf:queue_seconds_count") > 0
