"""llama.cpp's readers of answers: what they find by a template, and what strangers cannot make them
do."""
# ruff: noqa: RUF001 (DeepSeek's marks)

from __future__ import annotations

import json
import threading
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from swift_gguf.errors import NativeLibraryError
from swift_gguf.native import chat as native_chat
from swift_gguf.native.chat import Reader
from tests.fixtures import chat_templates

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Says how the weather is.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
ULM = {"city": "Ulm", "days": 3}
ARGUMENTS = json.dumps(ULM)
FORMS = {
    "HERMES": (
        f'I look.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
        ("I look.\n", ""),
    ),
    "QWEN_CODER": (
        "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nUlm\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        ("I look.\n", ""),
    ),
    "LLAMA": (f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}', ("", "")),
    "MISTRAL": (f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ARGUMENTS}}}]', ("", "")),
    "GPT_OSS": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.get_weather <|constrain|>json<|message|>{ARGUMENTS}",
        ("", "Hm."),
    ),
    "DEEPSEEK": (
        "Hm.</think>I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather"
        f"<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("I look.", "Hm."),
    ),
    "COMMAND": (
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "get_weather", '
        f'"parameters": {ARGUMENTS}}}]<|END_ACTION|>',
        ("", ""),
    ),
}


def syntax(template: str, **fields: Any) -> str:
    messages = [{"role": "user", "content": "Hello"}]
    return native_chat.analyse(
        {"template": template, "messages": messages, "tools": [WEATHER], **fields}
    )


def reader(name: str) -> Reader:
    return Reader(syntax(getattr(chat_templates, name)))


@pytest.mark.parametrize("name", FORMS)
def test_calls_and_thoughts_are_read_as_the_template_has_them(name: str) -> None:
    text, (content, thought) = FORMS[name]
    said = reader(name).read(text, is_partial=False)
    (call,) = said["tool_calls"]
    assert call["name"] == "get_weather"
    assert json.loads(call["arguments"]) == ULM
    assert (said["content"], said["reasoning_content"]) == (content, thought)


@pytest.mark.parametrize("name", FORMS)
def test_what_a_part_of_an_answer_says_stays_said(name: str) -> None:
    text, _ = FORMS[name]
    reads, before = reader(name), {"content": "", "reasoning_content": ""}
    for n in range(len(text) + 1):
        said = reads.read(text[:n], is_partial=True)
        for part, earlier in before.items():
            assert said[part].startswith(earlier)
            before[part] = said[part]


def test_what_is_no_answer_of_the_syntax_is_an_error() -> None:
    reads = reader("HERMES")
    with pytest.raises(ValueError, match="format"):
        reads.read(
            '<tool_call>\n{"name": "no_tool", "arguments": {}}\n</tool_call>', is_partial=False
        )
    assert reads.read("a \ud800", is_partial=False)["content"] == "a ?"


@pytest.mark.parametrize(
    "bad", ["", "[]", "{}", '{"format": 99, "parser": ""}', '{"format": 2, "parser": "{"}']
)
def test_what_is_no_syntax_is_an_error(bad: str) -> None:
    with pytest.raises(ValueError):
        Reader(bad)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 +",
        "{% for m in messages %}",
        "{{ raise_exception('no') }}",
        "{{ messages.no.thing() }}",
    ],
)
def test_a_template_that_fails_is_an_error(template: str) -> None:
    assert json.loads(syntax(template)).keys() == {"error"}


HOSTILE = {
    "objects": ("HERMES", '<tool_call>\n{"name": "get_weather", "arguments": ' + '{"a":' * 50_000),
    "lists": ("LLAMA", '{"name": "get_weather", "parameters": {"city": ' + "[" * 100_000),
    "within a string": ("LLAMA", '{"name": "get_weather", "parameters": {"city": "' + "[" * 9_999),
    "messages": ("GPT_OSS", "<|channel|>analysis<|message|>a<|end|><|start|>assistant" * 20_000),
    "marks": ("MISTRAL", "[TOOL_CALLS]" * 50_000),
    "half marks": ("DEEPSEEK", "<｜tool▁calls▁" * 50_000),
    "tags": ("QWEN_CODER", "<tool_call><function=get_weather><parameter=city>" * 20_000),
    "escapes": ("LLAMA", '{"name": "get_weather", "parameters": {"city": "' + "\\" * 100_001),
}


@pytest.mark.parametrize("is_partial", [False, True])
@pytest.mark.parametrize("kind", HOSTILE)
def test_no_answer_ends_the_process_or_goes_on_for_ever(kind: str, is_partial: bool) -> None:
    """In a thread, whose stack may be the smaller one."""
    name, text = HOSTILE[kind]
    reads = reader(name)
    took: list[float] = []

    def read() -> None:
        start = perf_counter()
        with suppress(ValueError):
            reads.read(text, is_partial=is_partial)
        took.append(perf_counter() - start)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert took[0] < 20  # a busy machine; hundredths of a second on a quiet one


def test_ordinary_nesting_is_no_trouble() -> None:
    value: Any = "x"
    for _ in range(40):
        value = [{"a": value}]
    arguments = {"city": value}
    free = {"type": "object", "properties": {"city": {}}}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": free}}
    text = json.dumps({"name": "get_weather", "arguments": arguments})
    reads = Reader(syntax(chat_templates.HERMES, tools=[tool]))
    (call,) = reads.read(f"<tool_call>\n{text}\n</tool_call>", is_partial=False)["tool_calls"]
    assert json.loads(call["arguments"]) == arguments


def test_a_list_of_numbers_is_read_soon() -> None:
    numbers = {"city": "Ulm", "days": 3, "at": list(range(40_000))}
    text = json.dumps({"name": "get_weather", "arguments": numbers})
    said = reader("HERMES").read(f"<tool_call>\n{text}\n</tool_call>", is_partial=False)
    assert json.loads(said["tool_calls"][0]["arguments"]) == numbers


def test_a_library_that_is_missing_or_no_library_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libllama.so").touch()
    monkeypatch.setattr(native_chat, "find_library", lambda: tmp_path)
    for wrong, told in ((None, "chat library is not in"), ("libswift_chat.so", "could not load")):
        if wrong:
            (tmp_path / wrong).write_text("no library")
        with pytest.raises(NativeLibraryError, match=f"{told}.*reinstall"):
            native_chat._library.__wrapped__()
