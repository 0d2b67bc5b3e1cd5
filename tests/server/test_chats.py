"""How prompts are made of chats: variables of the template, answers that go on, old calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.llama import Llama
from tests.fixtures.tokenizer import THINKING
from tests.server.conftest import Server

CHAT = "/v1/chat/completions"
HELLO: Any = {"role": "user", "content": "Hello!"}
TURN = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
QUICK: Any = {"max_tokens": 12, "temperature": 0}
LOOK: Any = {
    "name": "look",
    "parameters": {
        "type": "object",
        "properties": {"at": {"enum": ["é"]}},
        "required": ["at"],
    },
}


@pytest.fixture(scope="module")
def thinking(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose template reads variables."""
    path = tmp_path_factory.mktemp("template") / "thinking.jinja"
    path.write_text(THINKING)
    started = ("--chat-template", path, "--chat-template-kwargs", '{"reasoning_effort": "high"}')
    server = Server(model, "-c", 1024, "-t", 1, *started).wait_until_ready()
    yield server
    assert server.terminate() == 0, server.log


def said(server: Server, **fields: Any) -> dict[str, Any]:
    status, body = server.post(CHAT, {"messages": [HELLO], **QUICK, **fields})
    assert status == 200, body
    message: dict[str, Any] = body["choices"][0]["message"]
    return message | {"n": body["usage"]["prompt_tokens"]}


def streamed(server: Server, **fields: Any) -> dict[str, str]:
    """The parts of a streamed answer, joined."""
    body = {"messages": [HELLO], **QUICK, "stream": True, **fields}
    lines = server.request("POST", CHAT, body)[2].decode().splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    joined: dict[str, str] = {}
    for event in events:
        for choice in json.loads(event)["choices"]:
            for name, text in choice["delta"].items():
                if isinstance(text, str) and name != "role":
                    joined[name] = joined.get(name, "") + text
    return joined


def completed(server: Server, prompt: str, **fields: Any) -> dict[str, Any]:
    """What the model makes of a prompt."""
    status, body = server.post("/v1/completions", {"prompt": prompt, **QUICK, **fields})
    assert status == 200, body
    return {"content": body["choices"][0]["text"], "n": body["usage"]["prompt_tokens"]}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """But for blanks before a new answer, which llama.cpp's reader of a template drops."""
    return found["n"] == wanted["n"] and found["content"] in (
        wanted["content"],
        wanted["content"].lstrip(),
    )


def test_variables_change_the_prompt(thinking: Server) -> None:
    high = f"<|im_start|>system\nReasoning: high<|im_end|>\n{TURN}"
    assert same(said(thinking), completed(thinking, high))
    quick = completed(thinking, f"{high}<think>\n\n</think>\n\n")
    for fields in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": '{"enable_thinking": false}'},
        {"enable_thinking": False},
        {"thinking": {"type": "disabled"}},
    ):
        assert same(said(thinking, **fields), quick)
    low = completed(thinking, high.replace("high", "low"))
    assert same(said(thinking, reasoning_effort="low"), low)
    assert same(said(thinking, chat_template_kwargs={"reasoning_effort": "low"}), low)
    none = completed(thinking, f"{TURN}<think>\n\n</think>\n\n")
    assert same(said(thinking, reasoning_effort="none"), none)


def test_an_answer_goes_on(server: Server) -> None:
    wanted = completed(server, f"{TURN}Hello. How")
    assert wanted["content"]
    last = {"role": "assistant", "content": "Hello. How"}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "Hello. How"}]}
    for message in (last, parts):
        for flags in (
            {},
            {"continue_final_message": True},
            {"continue_final_message": True, "add_generation_prompt": False},
            {"add_generation_prompt": False},
        ):
            assert same(said(server, messages=[HELLO, message], **flags), wanted)
    turns = [HELLO, last]
    assert said(server, messages=turns)["content"] == wanted["content"]  # blanks included
    assert streamed(server, messages=turns) == {"content": wanted["content"]}
    whole = "Hello. How" + wanted["content"]
    assert said(server, messages=turns, echo=True)["content"] == whole
    assert streamed(server, messages=turns, echo=True) == {"content": whole}
    new = completed(server, f"{TURN}Hello. How<|im_end|>\n<|im_start|>assistant\n")
    for flags in ({"add_generation_prompt": True}, {"continue_final_message": False}):
        assert same(said(server, messages=turns, **flags), new)


def test_a_prompt_may_end_with_the_last_message(server: Server) -> None:
    prompt = TURN.removesuffix("<|im_start|>assistant\n")
    assert same(said(server, add_generation_prompt=False), completed(server, prompt))


def test_thoughts_go_on(thinking: Server) -> None:
    """Blanks included: what is new begins where the old ends."""
    prompt = f"<|im_start|>system\nReasoning: high<|im_end|>\n{TURN}<think>\nHm, so"
    free = completed(thinking, prompt)
    last = {"role": "assistant", "content": "", "reasoning_content": "Hm, so"}
    turns = [HELLO, last]
    found = said(thinking, messages=turns)
    assert (found["reasoning_content"], found["content"]) == (free["content"].rstrip(), "")
    assert found["n"] == free["n"]
    echoed = said(thinking, messages=turns, echo=True)
    assert echoed["reasoning_content"] == "Hm, so" + found["reasoning_content"]
    assert streamed(thinking, messages=turns) == {"reasoning_content": found["reasoning_content"]}
    # an answer after thoughts, both of which are there
    both = {"role": "assistant", "content": "Yes,", "reasoning_content": "Hm"}
    after = completed(thinking, prompt.replace("Hm, so", "Hm\n</think>\n\nYes,"))
    assert same(said(thinking, messages=[HELLO, both]), after)
    # what the client writes of thoughts itself
    raw = {"role": "assistant", "content": "<think>Hm, so"}
    raw_prompt = prompt.replace("<think>\nHm", "<think>Hm")
    found = said(thinking, messages=[HELLO, raw])
    assert found["reasoning_content"] == completed(thinking, raw_prompt)["content"].rstrip()
    ended = {"grammar": 'root ::= " it is</think>\\n\\nYes"', "max_tokens": 100}
    found = said(thinking, messages=turns, **ended)
    assert (found["reasoning_content"], found["content"]) == (" it is", "Yes")


def test_thoughts_stay_in_the_content(thinking: Server) -> None:
    text = "<think>Hm</think>Yes"
    grammar = f"root ::= {json.dumps(text)}"
    fields = {"grammar": grammar, "max_tokens": 100}
    assert said(thinking, **fields)["reasoning_content"] == "Hm"
    assert said(thinking, **fields, reasoning_format="none")["content"] == text


def test_what_cannot_go_on_is_told(server: Server) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    last: list[Any] = [
        HELLO,
        {"role": "assistant", "content": "I look", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "3"},
    ]
    for message in last:
        body = {"messages": [HELLO, message], "continue_final_message": True}
        status, told = server.post(CHAT, body)
        assert status == 400
        assert "only an assistant's message without tool calls" in told["error"]["message"]
    thought = {"role": "assistant", "content": None, "reasoning_content": "Hm"}
    status, told = server.post(CHAT, {"messages": [HELLO, thought]})
    assert status == 400
    assert "does not show the reasoning_content" in told["error"]["message"]


def test_an_answer_that_goes_on_with_a_call(server: Server) -> None:
    call = '<tool_call>{"name": "look", "arguments": {"at": "é"}}</tool_call>'
    turns = [HELLO, {"role": "assistant", "content": "I look."}]
    fields = {"messages": turns, "tools": [{"type": "function", "function": LOOK}]}
    found = said(server, **fields, grammar=f"root ::= {json.dumps(call, ensure_ascii=False)}",
                 max_tokens=100)  # fmt: skip
    assert found["tool_calls"][0]["function"]["name"] == "look"
    forced = said(server, **fields, tool_choice="required", max_tokens=100)
    assert json.loads(forced["tool_calls"][0]["function"]["arguments"]) == {"at": "é"}


@pytest.mark.parametrize("n", [4, 12, 20, 40, 55])
def test_a_call_goes_on(server: Server, n: int) -> None:
    """It is one, wherever it was cut; what turns out to be none is not told again."""
    call = '<tool_call>{"name": "look", "arguments": {"at": "é"}}</tool_call>'
    fields: dict[str, Any] = {
        "messages": [HELLO, {"role": "assistant", "content": call[:n]}],
        "tools": [{"type": "function", "function": LOOK}],
        "max_tokens": 100,
    }
    rest = f"root ::= {json.dumps(call[n:], ensure_ascii=False)}"
    found = said(server, **fields, grammar=rest)
    assert json.loads(found["tool_calls"][0]["function"]["arguments"]) == {"at": "é"}
    assert not found["content"]
    none = {"grammar": 'root ::= " is nothing </tool_call>"'}
    assert said(server, **fields, **none)["content"] == " is nothing </tool_call>"
    assert streamed(server, **fields, **none) == {"content": " is nothing </tool_call>"}


TWO = '<tool_call>{"name": "look", "arguments": {"at": "é"}}</tool_call>'


def test_at_most_one_call(server: Server) -> None:
    fields = {
        "tools": [{"type": "function", "function": LOOK}],
        "grammar": f"root ::= {json.dumps(f'I look.{TWO} {TWO}', ensure_ascii=False)}",
        "max_tokens": 200,
    }
    assert len(said(server, **fields)["tool_calls"]) == 2
    assert len(said(server, **fields, parallel_tool_calls=False)["tool_calls"]) == 1
    body = {"messages": [HELLO], **fields, "parallel_tool_calls": False, "stream": True}
    events = server.request("POST", CHAT, body)[2]
    assert events.count(b'"name":"look"') == 1
    assert b'"finish_reason":"tool_calls"' in events


def test_functions_as_before_there_were_tools(server: Server) -> None:
    fields: Any = {"functions": [LOOK], "function_call": {"name": "look"}, "max_tokens": 100}
    status, body = server.post(CHAT, {"messages": [HELLO], **fields})
    choice = body["choices"][0]
    assert (status, choice["finish_reason"]) == (200, "function_call")
    call = choice["message"]["function_call"]
    assert "tool_calls" not in choice["message"]
    assert (call["name"], json.loads(call["arguments"])) == ("look", {"at": "é"})
    events = server.request("POST", CHAT, {"messages": [HELLO], **fields, "stream": True})[2]
    assert b'"function_call":{"name":"look"' in events
    assert b'"finish_reason":"function_call"' in events
    assert b"tool_calls" not in events
    turns = [HELLO, choice["message"], {"role": "function", "name": "look", "content": "3"}]
    assert said(server, messages=turns, functions=[LOOK])["content"]
    fields["function_call"] = {"name": "book"}
    assert server.post(CHAT, {"messages": [HELLO], **fields})[0] == 400


def test_a_field_that_is_not_held_is_named(server: Server) -> None:
    status, told = server.post(CHAT, {"messages": [HELLO], "modalities": ["text", "audio"]})
    assert (status, told["error"]["param"]) == (400, "modalities")
    status, told = server.post(CHAT, {"messages": [HELLO], "chat_template_kwargs": {"tools": 1}})
    assert (status, told["error"]["param"]) == (400, "chat_template_kwargs")
    both = {"continue_final_message": True, "add_generation_prompt": True}
    status, told = server.post(CHAT, {"messages": [HELLO], **both})
    assert (status, told["error"]["param"]) == (400, "add_generation_prompt")
    status, told = server.post("/v1/completions", {"prompt": "x", "guided_json": {}})
    assert (status, told["error"]["param"]) == (400, "guided_json")


def test_a_model_without_a_template(
    serve: Callable[..., Server], tiny: Callable[..., Path]
) -> None:
    """It is asked in ChatML, as by llama-server; answers go on there, too."""
    bare = tiny("llama", n_ctx=1024, quant="Q8_0", template=None)
    server = serve(bare, "-c", 512, "-t", 1).wait_until_ready()
    assert same(said(server), completed(server, TURN))
    last = {"role": "assistant", "content": "Hel"}
    assert same(said(server, messages=[HELLO, last]), completed(server, f"{TURN}Hel"))


def test_in_process_too(tiny: Callable[..., Path]) -> None:
    """`Llama` takes what the server does."""
    path = tiny("llama", quant="Q8_0", template=THINKING)
    llama = Llama(str(path), n_ctx=512, n_threads=1, verbose=False)

    def completed(prompt: str) -> str:
        return str(llama.create_completion(prompt, **QUICK)["choices"][0]["text"])

    partial = [HELLO, {"role": "assistant", "content": "Hello. How"}]
    found = llama.create_chat_completion(partial, **QUICK, continue_final_message=True)
    assert found["choices"][0]["message"]["content"] == completed(f"{TURN}Hello. How")
    found = llama.create_chat_completion([HELLO], **QUICK, add_generation_prompt=False)
    text = completed(TURN.removesuffix("<|im_start|>assistant\n"))
    assert found["choices"][0]["message"]["content"] == text
    told = {"enable_thinking": False}
    chunks = llama.create_chat_completion([HELLO], **QUICK, chat_template_kwargs=told, stream=True)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == completed(f"{TURN}<think>\n\n</think>\n\n")
    with pytest.raises(ValueError, match="'messages' cannot be set"):
        llama.create_chat_completion([HELLO], chat_template_kwargs={"messages": []})
    llama.chat_format = "llama-2"
    with pytest.raises(ValueError, match="do not go by a chat template"):
        llama.create_chat_completion(partial, **QUICK, continue_final_message=True)
    llama.close()
