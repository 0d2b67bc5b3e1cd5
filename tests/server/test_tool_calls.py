"""Tool calls of a server as clients see them.  A grammar makes the model write what others have
learned; what it writes, whole and streamed, must be the same calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.llama import Llama
from tests.fixtures import chat_templates
from tests.fixtures.tokenizer import CHATML
from tests.native.test_chat_answers import FORMS
from tests.server.conftest import Server

CHAT = "/v1/chat/completions"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = json.dumps({"name": "get_weather", "arguments": {"city": "Ulm"}})
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def hermes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template = tmp_path_factory.mktemp("template") / "hermes"
    template.write_text(chat_templates.HERMES)
    flags = ("-c", 1024, "-t", 1, "--cache-ram", 0, "--chat-template", template)
    running = Server(model, *flags).wait_until_ready()
    yield running
    running.close()


def streamed(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """The message that a client puts together."""
    _, _, events = server.request("POST", CHAT, {**body, "stream": True})
    lines = [line[6:] for line in events.decode().splitlines() if line.startswith("data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines]
    message: dict[str, Any] = {"content": "", "tool_calls": []}
    for choice in choices:
        message["content"] += choice["delta"].get("content") or ""
        message["tool_calls"] += [c["function"] for c in choice["delta"].get("tool_calls", ())]
    return {**message, "finish_reason": choices[-1]["finish_reason"]}


def answer(server: Server, said: str, **fields: Any) -> dict[str, Any]:
    """A message that says this, the same whole and in a stream."""
    body = {"messages": HELLO, "tools": [TOOL], "grammar": f"root ::= {json.dumps(said)}", **fields}
    status, whole = server.post(CHAT, body)
    assert status == 200, whole
    choice = whole["choices"][0]
    message = {
        "content": choice["message"]["content"] or "",
        "tool_calls": [call["function"] for call in choice["message"].get("tool_calls", ())],
        "finish_reason": choice["finish_reason"],
    }
    assert streamed(server, body) == message
    return message


@pytest.mark.parametrize(
    "said",
    [
        f"<tool_call>\n{CALL}\n</tool_call>",
        CALL,
        f"```json\n{CALL}\n```",
        f"[TOOL_CALLS][{CALL}]",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nUlm\n</parameter>\n</function>\n</tool_call>",
    ],
)
def test_calls_are_found(hermes: Server, said: str) -> None:
    found = answer(hermes, said)
    (call,) = found["tool_calls"]
    assert call["name"] == "get_weather"
    assert json.loads(call["arguments"]) == {"city": "Ulm"}
    assert (found["content"], found["finish_reason"]) == ("", "tool_calls")


@pytest.mark.parametrize(
    "said",
    ['```json\n{"name": "noun", "arguments": {}}\n```', f"So: {CALL}", "<tool_call>x</tool_call>"],
)
def test_what_is_no_call_is_content(hermes: Server, said: str) -> None:
    found = answer(hermes, said)
    assert found == {"content": said, "tool_calls": [], "finish_reason": "stop"}


def test_a_call_that_must_be_and_is_cut(hermes: Server) -> None:
    body = {"messages": HELLO, "tools": [TOOL], "tool_choice": "required", "seed": 3}
    for cut in ({"max_tokens": 40}, {"stop": ["arguments"]}):
        _, whole = hermes.post(CHAT, {**body, **cut})
        choice = whole["choices"][0]
        calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
        assert [call["name"] for call in calls] == ["get_weather"]
        assert not choice["message"]["content"]
        assert choice["finish_reason"] == ("length" if "max_tokens" in cut else "stop")
        assert streamed(hermes, {**body, **cut})["tool_calls"] == calls


def test_earlier_calls_without_arguments(hermes: Server) -> None:
    def prompt_tokens(arguments: Any) -> int:
        call = {"id": "x", "type": "function",
                "function": {"name": "get_weather", "arguments": arguments}}  # fmt: skip
        turns = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
        _, told = hermes.post(CHAT, {"messages": turns, "max_tokens": 1})
        return int(told["usage"]["prompt_tokens"])

    nothing: tuple[object, ...] = ("", " ", "null", "{}", None, {})
    assert len({prompt_tokens(given) for given in nothing}) == 1
    turns = [*HELLO, {"role": "assistant", "tool_calls": [{"function": {"name": "x"}}]}]
    status, told = hermes.post(CHAT, {"messages": turns, "max_tokens": 1})
    assert (status, told["error"]["param"]) == (400, "messages.1")
    assert "has no arguments" in told["error"]["message"]


def test_the_template_that_a_file_has_for_tools(
    tiny: Callable[..., Path], serve: Callable[..., Server]
) -> None:
    both = (
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": chat_templates.HERMES},
    )
    path = tiny("llama", n_ctx=1024, template=both)
    llama = Llama(str(path), n_ctx=1024, n_threads=1, verbose=False)
    counts = []
    for tools in (None, [TOOL]):
        options: Any = {"messages": HELLO, "max_tokens": 1, "tools": tools}
        counts.append(llama.create_chat_completion(**options)["usage"]["prompt_tokens"])
    prompt = f"<|im_start|>system\n# Tools\n{json.dumps(TOOL)}\n<|im_end|>\n"
    extra = len(llama.tokenize(prompt.encode(), add_bos=False, special=True))
    llama.close()
    assert counts[1] == counts[0] + extra
    server = serve(path, "-c", 1024, "-t", 1).wait_until_ready()
    for tools, count in zip(([], [TOOL]), counts, strict=True):
        body = {"messages": HELLO, "max_tokens": 1, "tools": tools}
        assert server.post(CHAT, body)[1]["usage"]["prompt_tokens"] == count
    said = f"<tool_call>\n{CALL}\n</tool_call>"
    assert answer(server, said)["tool_calls"][0]["name"] == "get_weather"


def test_marks_that_are_control_tokens(
    tiny: Callable[..., Path], serve: Callable[..., Server]
) -> None:
    """As Mistral's [TOOL_CALLS] is: no part of a text, but for who looks for calls."""
    template = chat_templates.MISTRAL.replace("[TOOL_CALLS]", "<|im_start|>")
    path = tiny("llama", n_ctx=1024, template=template)
    server = serve(path, "-c", 1024, "-t", 1, "--cache-ram", 0).wait_until_ready()
    (mark,) = server.post("/tokenize", {"content": "<|im_start|>"})[1]["tokens"]
    fields = {"logit_bias": {str(mark): 100}, "temperature": 0}
    found = answer(server, f"<|im_start|>[{CALL}]", **fields)
    assert found["content"] == ""
    assert [call["name"] for call in found["tool_calls"]] == ["get_weather"]
    assert answer(server, f"<|im_start|>[{CALL}]", **fields, tools=[])["content"] == f"[{CALL}]"


def test_a_template_that_thinks_when_it_is_told_to(
    serve: Callable[..., Server], model: Path
) -> None:
    """As DeepSeek's: llama.cpp would tell it so, we do not."""
    flags = ("-c", 1024, "-t", 1, "--cache-ram", 0, "--chat-template", chat_templates.DEEPSEEK)
    server = serve(model, *flags).wait_until_ready()
    said, (content, thought) = FORMS["DEEPSEEK"]
    said = said.removeprefix(f"{thought}</think>")
    for variables in ({}, {"enable_thinking": False}):
        found = answer(server, said, chat_template_kwargs=variables)
        assert [call["name"] for call in found["tool_calls"]] == ["get_weather"]
        assert found["content"] == content


def test_a_hostile_template_only_loses_its_own_forms(
    serve: Callable[..., Server], model: Path
) -> None:
    """It is slow with a tool that is named like the ones llama.cpp tries templates with."""
    template = (
        "{% if messages[0].role == 'user' and messages[0].content != 'Hello' %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    )
    server = serve(model, "-c", 512, "-t", 1, "--chat-template", template).wait_until_ready()
    said = f"<tool_call>{CALL}</tool_call>"
    assert answer(server, said)["tool_calls"][0]["name"] == "get_weather"
    assert any("cannot analyse the chat template" in line for line in server.log)
