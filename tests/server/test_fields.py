"""Every field that clients may send is held, taken as harmless, or refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from swift_gguf.server.chat_requests import ChatRequest
from swift_gguf.server.errors import ApiError
from swift_gguf.server.fields import HARMLESS, UNHELD
from swift_gguf.server.requests import Body, CompletionRequest, Message, ToolChoice

HELLO: Any = [{"role": "user", "content": "Hello!"}]
PARTIAL: Any = [*HELLO, {"role": "assistant", "content": "Hel"}]


CALL: Any = {"function": {"name": "f", "arguments": "{}"}}


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": HELLO, **fields})


def fields_of(params: Any) -> set[str]:
    return set(params.CompletionCreateParamsBase.__annotations__) | {"stream"}


def test_openai_s_fields_are_all_known() -> None:
    """Those of the client that is installed, and those that newer ones have."""
    params = pytest.importorskip("openai.types.chat.completion_create_params")
    newer = {"moderation", "prompt_cache_options", "prompt_cache_retention", "safety_identifier"}
    known = ChatRequest.model_fields.keys() | HARMLESS | UNHELD.keys()
    assert fields_of(params) | newer <= known
    params = pytest.importorskip("openai.types.completion_create_params")
    known = CompletionRequest.model_fields.keys() | HARMLESS | UNHELD.keys()
    assert fields_of(params) <= known


def test_no_field_has_two_fates() -> None:
    for request in (ChatRequest, CompletionRequest):
        held = request.model_fields.keys()
        assert not held & HARMLESS
        assert not held & UNHELD.keys()
    assert not HARMLESS & UNHELD.keys()


@pytest.mark.parametrize("name", sorted(UNHELD))
def test_what_would_change_the_answer_is_refused(name: str) -> None:
    for value in ({"x": 1}, "strange", [["x"]], 17.5):
        for request in (chat, lambda **more: CompletionRequest(prompt="x", **more)):
            with pytest.raises(ApiError, match=f"^{name} is not supported here") as told:
                request(**{name: value})
            assert (told.value.status, told.value.param) == (400, name)
    for value in (None, *UNHELD[name]):
        chat(**{name: value})


def test_other_servers_names() -> None:
    request = chat(repetition_penalty=1.2, typ_p=0.5, n_predict=7)
    assert (request.repeat_penalty, request.typical_p, request.max_tokens) == (1.2, 0.5, 7)
    assert chat(repeat_penalty=1.2, repetition_penalty=1.3).repeat_penalty == 1.2
    assert CompletionRequest.model_validate({"prompt": "x", "n_predict": 7}).max_tokens == 7
    for fields in ({"repetition_penalty": -1}, {"typ_p": 0}, {"n_predict": -2}):
        with pytest.raises(ValidationError):
            chat(**fields)


def test_zero_is_not_false() -> None:
    chat(min_tokens=0.0, store=False)
    for fields in ({"min_tokens": False}, {"store": 0}, {"skip_special_tokens": 1}):
        with pytest.raises(ApiError):
            chat(**fields)


def test_what_changes_nothing_is_taken_and_so_is_what_nobody_knows() -> None:
    values: list[Any] = [None, "auto", {"a": 1}, [1], True]
    for name in (*sorted(HARMLESS), "chat_id", "session_id", "keep_alive"):
        for value in values:
            chat(**{name: value})


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {}),
        ({"chat_template_kwargs": {"a": [1]}}, {"a": [1]}),
        ({"chat_template_kwargs": '{"a": [1]}'}, {"a": [1]}),
        ({"enable_thinking": False}, {"enable_thinking": False, "thinking": False}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False, "thinking": False}),
        ({"thinking": {"type": "auto"}}, {}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False, "thinking": False}),
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high", "reasoning_strength": "high"}),
        (
            {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}},
            {"enable_thinking": True, "thinking": False},
        ),
    ],
    ids=str,
)
def test_what_a_template_is_told(fields: dict[str, Any], variables: dict[str, Any]) -> None:
    assert chat(**fields).prompting({}).variables == variables
    started = {"style": "dry"}
    assert chat(**fields).prompting(started).variables == started | variables


def test_what_the_server_was_started_with_gives_way() -> None:
    started = {"enable_thinking": False, "reasoning_effort": "low"}
    assert chat().prompting(started).variables == started
    assert chat(enable_thinking=True).prompting(started).variables["enable_thinking"] is True
    assert "reasoning_effort" not in chat(reasoning_effort="none").prompting(started).variables


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": '{"tools": []}'}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": "false"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": "enable_thinking"}, "chat_template_kwargs"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": '"{}"'}, "chat_template_kwargs"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "strange"}}, "thinking.type"),
        ({"reasoning_format": "deepseek-legacy"}, "reasoning_format"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        ({"continue_final_message": "title"}, "continue_final_message"),
        ({"functions": [{"name": "f"}], "tools": []}, "functions"),
        ({"functions": [{"name": "../f"}]}, "functions.0.name"),
        ({"tools": [{"function": {"name": "a/b"}}]}, "tools.0.function.name"),
        ({"tools": [{"function": {"name": "a" * 65}}]}, "tools.0.function.name"),
        ({"messages": [{"role": "ipython", "content": "x"}]}, "messages.0.role"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(ValidationError) as told:
        chat(**fields)
    where = ".".join(map(str, told.value.errors()[0]["loc"]))
    assert where.startswith(place)


@pytest.mark.parametrize(
    ("last", "fields", "continued"),
    [
        ({"content": "Hel"}, {}, "content"),
        ({"content": [{"type": "text", "text": "Hel"}]}, {}, "content"),
        ({"content": "Hel"}, {"add_generation_prompt": False}, "content"),
        ({"content": "Hel"}, {"continue_final_message": True}, "content"),
        ({"content": "Hel"}, {"add_generation_prompt": True}, None),
        ({"content": "Hel"}, {"continue_final_message": False}, None),
        ({"content": None, "reasoning_content": "Hm"}, {}, "reasoning_content"),
        ({"content": "Hel", "reasoning_content": "Hm"}, {}, "content"),
        ({"content": "", "reasoning_content": ""}, {}, None),
        ({"content": ""}, {"continue_final_message": True}, "content"),
        ({"content": "Hel"}, {"continue_final_message": "reasoning_content"}, "reasoning_content"),
        ({"content": "", "tool_calls": [CALL]}, {}, None),
        ({"content": "Hel", "tool_calls": [CALL]}, {}, None),
    ],
    ids=str,
)
def test_which_answers_go_on(last: Any, fields: dict[str, Any], continued: str | None) -> None:
    request = chat(messages=[*HELLO, {"role": "assistant", **last}], **fields)
    assert request.continued == continued
    assert request.prompting({}).continues == continued
    assert chat().continued is None


def test_an_answer_that_says_nothing_yet_is_none() -> None:
    blank = [*HELLO, {"role": "assistant", "content": ""}]
    assert len(chat(messages=blank).prompted) == 1
    for flags in ({"continue_final_message": True}, {"add_generation_prompt": False}):
        assert len(chat(messages=blank, **flags).prompted) == 2
    assert len(chat(messages=blank[1:]).prompted) == 1
    assert len(chat(messages=PARTIAL).prompted) == 2


def test_functions_are_tools() -> None:
    one = {"name": "look", "parameters": {"type": "object"}}
    offered = {"functions": [one, {"name": "book"}]}
    assert [tool.name for tool in chat(**offered).offered] == ["look", "book"]
    assert chat(**offered, function_call="none").offered == []
    assert not chat(**offered, function_call="auto").must_call
    named = chat(**offered, function_call={"name": "book"})
    assert named.must_call
    assert isinstance(named.choice, ToolChoice)
    assert named.choice.name == "book"
    assert named.calls_once
    assert not chat(tools=[{"function": one}]).calls_once
    assert chat(tools=[{"function": one}], parallel_tool_calls=False).calls_once


def test_messages_of_functions_are_those_of_tools() -> None:
    called = {"name": "look", "arguments": '{"at": "é"}'}
    message = Message.model_validate({"role": "assistant", "function_call": called})
    found = message.as_dict()
    assert "function_call" not in found
    assert found["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": "é"}}
    result = Message.model_validate({"role": "function", "name": "look", "content": "3"})
    assert result.as_dict() == {"role": "tool", "name": "look", "content": "3"}


def test_a_refusal_is_text() -> None:
    parts = [{"type": "refusal", "refusal": "I "}, {"type": "text", "text": "cannot"}]
    message = Message.model_validate({"role": "assistant", "content": parts})
    assert message.text == "I cannot"
    for part in ({"type": "refusal", "text": "x"}, {"type": "text"}, {"type": "image_url"}, {}):
        with pytest.raises(ValidationError, match="only text parts"):
            Message.model_validate({"role": "user", "content": [part]})


def test_null_is_as_good_as_nothing() -> None:
    names = ChatRequest.model_fields.keys() - {"messages"}
    assert chat(**dict.fromkeys(names)) == chat()
    assert issubclass(ChatRequest, Body)
