"""Calls and thoughts in the text of an answer: every form, whole and however it is cut into
chunks."""
# ruff: noqa: RUF001 (DeepSeek's marks)

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import pytest

from swift_gguf.server.reading import Answer, Expected, in_message, in_stream
from swift_gguf.server.requests import Tool
from swift_gguf.server.syntax import Syntaxes
from tests.fixtures import chat_templates
from tests.native.test_chat_answers import FORMS

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
WEATHER = Tool.model_validate(
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
)
TIME = Tool.model_validate({"type": "function", "function": {"name": "get_time"}})
TOOLS = (WEATHER, TIME)
ANY = Expected(tools=TOOLS)
ULM = {"city": "Ulm"}
CALL = json.dumps({"name": "get_weather", "arguments": ULM})
TIME_CALL = json.dumps({"name": "get_time", "arguments": {}})
XML = "<function=get_weather>\n<parameter=city>\nUlm\n</parameter>\n</function>"
SYNTAXES = Syntaxes(bos_token="<s>", eos_token="</s>")


def expected(name: str, tools: Sequence[Tool] = TOOLS) -> Expected:
    syntax = SYNTAXES.of(
        getattr(chat_templates, name), [t.model_dump(exclude_none=True) for t in tools]
    )
    assert syntax
    return replace(ANY, syntax=syntax, tools=tools)


def whole(text: str, wanted: Expected, reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    read = in_message(choice, wanted)
    return {**read["message"], "finish_reason": read["finish_reason"]}


def streamed(
    pieces: Sequence[str], wanted: Expected, reason: str = "stop"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The message that a client puts together, and the deltas."""
    chunks = [{"content": piece} for piece in pieces]
    parts = [{"role": "assistant"}, {"content": ""}, *chunks, {}]
    choices = [
        {"index": 0, "delta": part, "logprobs": None, "finish_reason": reason if not part else None}
        for part in parts
    ]
    out = list(in_stream(iter(choices), lambda: wanted))
    deltas = [choice["delta"] for choice in out]
    message: dict[str, Any] = {"role": "assistant"}
    for name in ("content", "reasoning_content"):
        message[name] = "".join(delta.get(name) or "" for delta in deltas)
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == list(range(len(calls)))
    message["tool_calls"] = [call["function"] for call in calls]
    (message["finish_reason"],) = [c["finish_reason"] for c in out if c["finish_reason"]]
    return message, deltas


def agree(text: str, wanted: Expected, reason: str = "stop") -> dict[str, Any]:
    """An answer read whole, and in pieces of many sizes, must be the same."""
    said = whole(text, wanted, reason)
    plain = {
        "role": "assistant",
        "content": said["content"] or "",
        "reasoning_content": said.get("reasoning_content", ""),
        "tool_calls": [call["function"] for call in said.get("tool_calls", ())],
        "finish_reason": said["finish_reason"],
    }
    dice = random.Random(7)
    for size in (1, 2, 5, 1000, None):
        pieces, at = [], 0
        while at < len(text):
            step = size or dice.randint(1, 12)
            pieces.append(text[at : at + step])
            at += step
        assert streamed(pieces, wanted, reason)[0] == plain, (size, text)
    return plain


def made(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(call["name"], json.loads(call["arguments"])) for call in message["tool_calls"]]


KNOWN = {
    "bare": CALL,
    "bare, with blanks": f"\n  {CALL}\n",
    "json fence": f"```json\n{CALL}\n```",
    "fence": f"```\n{CALL}\n```",
    "tools": f"<tools>\n{CALL}\n</tools>",
    "list in a tag": f"<tool_call>[{CALL}]</tool_call>",
    "bare list": f"[{CALL}]",
    "fence in a tag": f"<tool_call>\n```json\n{CALL}\n```\n</tool_call>",
    "parameters": '{"name": "get_weather", "parameters": {"city": "Ulm"}}',
    "OpenAI's": f'{{"type": "function", "function": {CALL}}}',
    "function first": '{"function": "get_weather", "arguments": {"city": "Ulm"}}',
    "arguments first": '{"arguments": {"city": "Ulm"}, "name": "get_weather"}',
    "python_tag": f"<|python_tag|>{CALL}",
    "TOOL_CALLS": f"[TOOL_CALLS][{CALL}]",
    "TOOL_CALLS, named": '[TOOL_CALLS]get_weather{"city": "Ulm"}',
    "TOOL_CALLS, ARGS": '[TOOL_CALLS]get_weather[ARGS]{"city": "Ulm"}',
    "Qwen3-Coder": f"<tool_call>\n{XML}\n</tool_call>",
    "Qwen3-Coder, no tag": XML,
    "no end": f"<tool_call>\n{CALL}",
    "arguments as text": "<tool_call>"
    '{"name": "get_weather", "arguments": "{\\"city\\": \\"Ulm\\"}"}</tool_call>',
}


@pytest.mark.parametrize("template", [None, "HERMES", "LLAMA", "MISTRAL", "DEEPSEEK"])
@pytest.mark.parametrize("form", KNOWN)
def test_a_known_tool_is_called_in_any_form(form: str, template: str | None) -> None:
    wanted = ANY if template is None else expected(template)
    thought = "Hm.</think>" if template == "DEEPSEEK" else ""  # which the prompt has opened
    text = thought + KNOWN[form]
    message = agree(text, wanted)
    assert made(message) == [("get_weather", ULM)]
    assert message["content"] == ""
    assert message["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("template", [None, "HERMES"])
@pytest.mark.parametrize(
    "text",
    [
        f"{CALL}\n{TIME_CALL}",
        f"<tool_call>{CALL}\n{TIME_CALL}</tool_call>",
        f"<tool_call>{CALL}</tool_call>\n<tool_call>\n{TIME_CALL}\n</tool_call>",
        f"<tool_call>\n{XML}\n<function=get_time>\n</function>\n</tool_call>",
        f"<function=get_weather>{json.dumps(ULM)}</function>\n<function=get_time>{{}}</function>",
        f"[TOOL_CALLS][{CALL}, {TIME_CALL}]",
        f"```json\n[{CALL}, {TIME_CALL}]\n```",
        f"<|python_tag|>{CALL}; {TIME_CALL}",
    ],
)
def test_several_are_called(text: str, template: str | None) -> None:
    message = agree(text, expected(template) if template else ANY)
    assert made(message) == [("get_weather", ULM), ("get_time", {})]
    assert message["content"] == ""


NOUN = '{"name": "noun", "arguments": {"word": "house"}}'


@pytest.mark.parametrize("template", [None, "HERMES", "LLAMA", "MISTRAL"])
@pytest.mark.parametrize(
    "text",
    [
        NOUN,
        f"```json\n{NOUN}\n```",
        f"<tools>{NOUN}</tools>",
        f"[TOOL_CALLS][{NOUN}]",
        '{"name": "get_weather"}',  # a word about the tool
        '{"name": "get_weather", "arguments": "Ulm"}',
        '{"name": "get_weather", "arguments": [1]}',
        '{"name": "get_weather", "arguments": {"city": ',
        '{"city": "Ulm"}',
        '{"type": "object", "name": "get_weather"}',
        "[1, 2, 3]",
        "[",
        "```",
        "```python\nget_weather('Ulm')\n```",
        f"Like this: {CALL}",
        f"{CALL} is how.",
        f"```json\n{CALL}\n```\nThat is a call.",
        "In <tools> and [TOOL_CALLS] and <|python_tag|>, or <function=x>, there are calls.",
        "<tool_call>look</tool_call> is no call",
        '<tool_call>{"name": "get_weather", "arguments": "Ulm"}</tool_call>',
        "<tool_call>",
        "a <tool_cal",
        "a < b, and x[TOOL",
        " \n",
        "",
        "Hello.\n\n",
        f"get_weather{CALL}, get_weather",
    ],
)
def test_what_is_no_call_is_said_as_it_is(text: str, template: str | None) -> None:
    message = agree(text, expected(template) if template else ANY)
    assert message["tool_calls"] == []
    assert message["content"] == text
    assert message["finish_reason"] == "stop"


def test_text_around_calls_is_said() -> None:
    text = (
        f"I look.\n<tool_call>{CALL}</tool_call> Then <b>, <tool_call>{TIME_CALL}</tool_call> end"
    )
    for wanted in (ANY, expected("HERMES")):
        message = agree(text, wanted)
        assert message["content"] == "I look.\n Then <b>,  end"
        assert made(message) == [("get_weather", ULM), ("get_time", {})]


def test_between_the_marks_of_its_own_a_model_may_call_what_there_is_not() -> None:
    """The client tells it."""
    for wanted in (ANY, expected("HERMES")):
        assert made(agree(f"<tool_call>\n{NOUN}\n</tool_call>", wanted))[0][0] == "noun"


@pytest.mark.parametrize("given", ["null", '""', '" "', '"null"', "{}", '"{}"'])
def test_no_arguments_are_an_empty_object(given: str) -> None:
    text = f'<tool_call>{{"name": "get_time", "arguments": {given}}}</tool_call>'
    for wanted in (ANY, expected("HERMES")):
        assert made(agree(text, wanted)) == [("get_time", {})]


def test_values_between_tags_have_their_types() -> None:
    text = XML.replace("Ulm", "1234").replace(
        "</function>",
        "<parameter=days>\n3\n</parameter>\n<parameter=at>\n[1]\n</parameter></function>",
    )
    assert made(agree(text, ANY)) == [("get_weather", {"city": "1234", "days": 3, "at": [1]})]


@pytest.mark.parametrize("name", FORMS)
def test_calls_by_template(name: str) -> None:
    text, (content, thought) = FORMS[name]
    message = agree(text, expected(name))
    assert made(message) == [("get_weather", {"city": "Ulm", "days": 3})]
    assert message["content"] == content.rstrip()
    assert message["reasoning_content"] == thought


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (None, "<think>\nHm, <tool_call>?\n</think>\n\nIt rains."),
        ("HERMES", "<think>\nHm, <tool_call>?\n</think>\n\nIt rains."),
        ("HERMES_THINKING", "\nHm, <tool_call>?\n</think>\n\nIt rains."),
        ("DEEPSEEK", "Hm, <tool_call>?</think>It rains."),
        ("GPT_OSS", "<|channel|>analysis<|message|>Hm, <tool_call>?<|end|><|start|>assistant"
                    "<|channel|>final<|message|>It rains."),
        ("COMMAND", "<|START_RESPONSE|>It rains.<|END_RESPONSE|>"),
    ],
)  # fmt: skip
def test_thoughts_and_answers_by_template(name: str | None, text: str) -> None:
    wanted = expected(name) if name else ANY
    if name == "HERMES_THINKING":
        wanted = replace(wanted, before="<think>")
    message = agree(text, wanted)
    assert message["content"] == "It rains."
    assert message["reasoning_content"] == ("Hm, <tool_call>?" if "Hm" in text else "")
    assert message["tool_calls"] == []


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ('{ "name": "get_weather", "arguments": {"ci', "get_weather", '{"ci'),
        ('{"name":"get_weather","arguments":', "get_weather", ""),
        ('{"name": "get_weather"', "get_weather", ""),
        ('{"name": "get_weather", "argu', "get_weather", ""),
        ('{"name": "get_weather", "arguments": {"city": "Ulm"}', "get_weather", '{"city": "Ulm"}'),
        ('{"name": "get_wea', None, None),
        ('{ "na', None, None),
    ],
)
@pytest.mark.parametrize("reason", ["length", "stop"])
def test_a_call_that_must_be_and_is_cut(
    text: str, name: str | None, arguments: str | None, reason: str
) -> None:
    message = agree(text, replace(ANY, must_call=True), reason)
    assert message["content"] == ""
    if name is None:
        assert message["tool_calls"] == []
    else:
        assert message["tool_calls"] == [{"name": name, "arguments": arguments}]
    is_whole = arguments is not None and arguments.endswith("}")
    assert message["finish_reason"] == ("tool_calls" if is_whole else reason)


@pytest.mark.parametrize("template", [None, "HERMES"])
def test_a_call_that_is_cut_by_length(template: str | None) -> None:
    wanted = expected(template) if template else ANY
    message = agree(
        'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"ci', wanted, "length"
    )
    assert message["tool_calls"] == [{"name": "get_weather", "arguments": '{"ci'}]
    assert (message["content"], message["finish_reason"]) == ("I look.", "length")


def test_only_what_may_be_a_call_is_held_back() -> None:
    for text in (
        "{1, 2} is a set.",
        '{"names": 1}',
        "```c\nint x;\n```",
        "a < b and c > d, [x] `y`",
    ):
        answer, last = Answer(ANY), ""
        for i, character in enumerate(text):
            answer.feed(character)
            if i >= 12:
                assert len(answer.said) >= i - 2, (text, answer.said)
            last = answer.said
        assert text.startswith(last)


def test_an_answer_of_the_template_comes_as_it_is_made() -> None:
    for name in ("HERMES", "LLAMA", "MISTRAL", "COMMAND"):
        answer = Answer(expected(name))
        text = (
            "<|START_RESPONSE|>" * (name == "COMMAND") + "It is sunny (25 C), I think: a < b. " * 9
        )
        held = 0
        for i in range(len(text)):
            answer.feed(text[i])
            held = max(held, i + 1 - len(answer.said)) if i > 40 else held
        assert held <= 4 + len("<|START_RESPONSE|>") * (name == "COMMAND")


def test_random_answers_are_the_same_in_a_stream() -> None:
    dice = random.Random(11)
    marks = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<tools>", "</tools>", "<think>",
             "</think>", "```json\n", "```", "[", "]", "{", '"']  # fmt: skip
    parts = [*marks, CALL, TIME_CALL, NOUN, XML, "\n", " ", "Hm."]
    for _ in range(150):
        text = "".join(dice.choices(parts, k=dice.randint(1, 6)))
        by_template = [expected(name) for name in ("HERMES", "LLAMA", "GPT_OSS")]
        for wanted in (ANY, *by_template, replace(ANY, must_call=True)):
            agree(text, wanted, dice.choice(["stop", "length"]))


def test_log_probabilities_of_what_is_held_back_come_too() -> None:
    pieces = ["I look.", "\n", "<tool_call>", CALL, "</tool_call>"]
    choices = [
        {"index": 0, "delta": {"content": piece}, "logprobs": {"content": [piece]}}
        for piece in pieces
    ]
    choices.append({"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"})
    stream = ({"finish_reason": None, **choice} for choice in choices)
    out = list(in_stream(stream, lambda: ANY))
    told = [choice["logprobs"]["content"][0] for choice in out if choice["logprobs"]]
    assert told == pieces


def test_a_template_whose_syntax_is_not_known_is_asked_once() -> None:
    """It ends the process that looks at it, or wants for ever."""
    for template in (
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ " + "(" * 200_000 + "1" + ")" * 200_000 + " }}",
        "{{ raise_exception('no') }}",
        "{{ unfinished",
    ):
        syntaxes = Syntaxes()
        tools = [WEATHER.model_dump(exclude_none=True)]
        assert syntaxes.of(template, tools) is None
        start = perf_counter()
        assert syntaxes.of(template, tools) is None
        assert perf_counter() - start < 0.1


def test_syntaxes_belong_to_tools_and_variables() -> None:
    syntaxes, tools = Syntaxes(), [WEATHER.model_dump(exclude_none=True)]
    one = syntaxes.of(chat_templates.DEEPSEEK, tools)
    assert one is syntaxes.of(chat_templates.DEEPSEEK, tools)
    other = syntaxes.of(chat_templates.DEEPSEEK, tools, {"enable_thinking": False})
    assert one
    assert other
    assert one.opening.endswith("<think>")
    assert other.opening.endswith("</think>")
    assert syntaxes.of(chat_templates.DEEPSEEK, []) is not one


@pytest.mark.parametrize(
    "odd", [True, {"$ref": "#/nowhere"}, {"type": "no such type"}, {"pattern": "(?<=x)["}, 3]
)
def test_a_parameter_that_llama_cpp_does_not_understand(odd: object) -> None:
    """Only its name and type are needed to read calls."""
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}, "odd": odd}
    parameters = {"type": "object", "properties": properties}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    syntax = SYNTAXES.of(chat_templates.DEEPSEEK, [tool])
    assert syntax
    message = agree(FORMS["DEEPSEEK"][0], replace(ANY, syntax=syntax))
    assert made(message) == [("get_weather", {"city": "Ulm", "days": 3})]


def test_a_long_answer_is_read_with_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 tokens of text, thoughts and arguments: all readings together read a few hundred times
    the answer."""
    wanted = expected("DEEPSEEK")
    assert wanted.syntax
    n_read, read = 0, wanted.syntax.reader.read

    def counting(text: str, *, is_partial: bool) -> dict[str, Any]:
        nonlocal n_read
        n_read += len(text)
        return read(text, is_partial=is_partial)

    monkeypatch.setattr(wanted.syntax.reader, "read", counting)
    arguments = json.dumps({"city": "Ulm", "at": list(range(1000))})
    call = (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather"
        f"<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )
    text = "I think (x < y). " * 500 + "</think>" + "It is `a[0] < b`. " * 300 + call
    answer = Answer(wanted)
    for i in range(0, len(text), 5):
        answer.feed(text[i : i + 5])
    answer.finish(is_cut=False)
    assert answer.thought.startswith("I think (x < y). I think")
    assert json.loads(answer.calls[0]["function"]["arguments"])["at"] == list(range(1000))
    assert n_read < 300 * len(text)


@pytest.mark.parametrize("template", [None, "HERMES", "GPT_OSS"])
@pytest.mark.parametrize(
    "part",
    ["<tool_call>", "<tool_call>{", "<tools>[{", f"<tool_call>{TIME_CALL}</tool_call>",
     "<function=get_time>", '{"name": "get_time", "arguments": ', "<parameter=", "["],
)  # fmt: skip
def test_no_answer_takes_long_to_read(part: str, template: str | None) -> None:
    """100,000 characters; nothing here may grow with their square."""
    wanted = expected(template) if template else ANY
    text = part * (100_000 // len(part))
    start = perf_counter()
    whole(text, wanted, "length")
    answer = Answer(wanted)
    for i in range(0, len(text), 50):
        answer.feed(text[i : i + 50])
    answer.finish(is_cut=True)
    assert perf_counter() - start < 30  # of a busy machine; a second of a quiet one
