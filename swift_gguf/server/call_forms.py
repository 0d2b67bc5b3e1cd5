"""The forms in which models write tool calls, whatever their chat template says.

A call stands between two marks, or it is the whole answer.  All functions are pure functions of
text.  They return None if the text is not a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FENCE = "```"
_LANGUAGES = ("", "json", "tool_call")
"""Languages of a code fence that may hold a call."""
_KEYS = ("name", "arguments", "parameters", "type", "function", "id")
"""A call begins with one of these keys."""
_ARGUMENTS = ("arguments", "parameters")
_decoder = json.JSONDecoder()
_SEPARATORS = " \t\r\n,;"
_NAMED = re.compile(r"\s*(?:\[TOOL_CALLS\]\s*)?([A-Za-z0-9_.:/-]+)\s*(?:\[[A-Z_]+\]\s*)?(?=\{)")
"""Mistral's newer form: a name, ``[ARGS]`` in some versions, and the arguments."""
_CUT = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")(?:\s*,\s*"(?:arguments|parameters)"\s*:\s*)?',
)


@dataclass(frozen=True)
class Form:
    """A call.

    arguments: the text of a JSON object.  In a call that was cut off, it is incomplete.
    """

    name: str
    arguments: str


def calls_in(text: str, tools: Mapping[str, Mapping[str, Any]]) -> list[Form] | None:
    """The calls in `text`, if it consists of calls only.

    A call is a JSON object, alone or in a list, or has Qwen3-Coder's or Mistral's form.  A code
    fence around the calls is allowed.

    tools: the schemas of the parameters, by the tool's name.
    """
    text = _without_fence(text.strip())
    try:
        if text.startswith("<function="):
            return _tagged(text, tools)
        if match := _NAMED.match(text):
            return _named(text, match)
        objects = list(_objects(text))
    except (ValueError, RecursionError):
        return None
    calls = [_call(value) for value in objects]
    return [call for call in calls if call] if calls and all(calls) else None


def bare_calls(text: str, tools: Mapping[str, Mapping[str, Any]]) -> list[Form] | None:
    """The calls of an answer that has no marks and consists of calls only.

    Each must name one of the tools and have arguments.
    """
    try:
        objects = list(_objects(_without_fence(text.strip())))
    except (ValueError, RecursionError):
        return None
    calls = [_call(value, needs_arguments=True) for value in objects]
    if not calls or not all(call and call.name in tools for call in calls):
        return None
    return [call for call in calls if call]


def cut_call(text: str) -> Form | None:
    """A call that was cut off after its name, with the arguments as far as they go."""
    match = _CUT.match(text)
    if match is None:
        return None
    rest = text[match.end() :]
    has_arguments = match.group().rstrip().endswith(":")
    try:
        name = json.loads(match[1])
        if has_arguments:
            rest = rest[: _decoder.raw_decode(rest)[1]]  # without the closing braces
    except (ValueError, RecursionError):
        pass
    return Form(str(name), rest if has_arguments else "")


def may_be_bare(text: str, names: Sequence[str]) -> bool | None:
    """True if an answer that begins with `text` is a call without marks.  None: not known yet."""
    rest = text.lstrip()
    if FENCE.startswith(rest[:3]):
        if len(rest) < 3:
            return None
        language, newline, rest = rest[3:].partition("\n")
        language = language.strip().lower()
        if not newline:
            return _begins(language, _LANGUAGES)
        if language not in _LANGUAGES:
            return False
        rest = rest.lstrip()
    rest = rest.removeprefix("[").lstrip()
    for mark in '{"':
        if not rest.startswith(mark):
            return False if rest else None
        rest = rest[1:].lstrip() if mark == "{" else rest[1:]
    key, quote, rest = rest.partition('"')
    if not quote:
        return _begins(key, _KEYS)
    values = {"name": names, "type": ("function",)}.get(key)
    if key not in _KEYS or values is None:
        return key in _KEYS
    for mark in ':"':
        rest = rest.lstrip()
        if not rest.startswith(mark):
            return False if rest else None
        rest = rest[1:]
    value, quote, _ = rest.partition('"')
    return value in values if quote else _begins(value, values)


def _begins(text: str, whole: Sequence[str]) -> bool | None:
    return None if any(one.startswith(text) for one in whole) else False


def _without_fence(text: str) -> str:
    if not text.startswith(FENCE):
        return text
    language, _, inside = text[len(FENCE) :].partition("\n")
    if language.strip().lower() not in _LANGUAGES:
        return text
    return inside.removesuffix(FENCE).strip()


def _objects(text: str) -> Iterator[Any]:
    """The JSON values in the text, one after the other.  Lists are flattened.

    Raises:
        ValueError: the text has something else in it.
    """
    at = 0
    while at < len(text):
        value, at = _decoder.raw_decode(text, at)
        yield from value if isinstance(value, list) else [value]
        while at < len(text) and text[at] in _SEPARATORS:
            at += 1


def _call(value: Any, *, needs_arguments: bool = False) -> Form | None:
    if not isinstance(value, dict):
        return None
    if isinstance(inner := value.get("function"), dict):  # OpenAI's form
        value = inner
    name = value.get("name", value.get("function"))
    given = next((value[key] for key in _ARGUMENTS if key in value), None)
    if not isinstance(name, str) or not name:
        return None
    if needs_arguments and not any(key in value for key in _ARGUMENTS):
        return None
    arguments = object_text(given)
    return None if arguments is None else Form(name, arguments)


def object_text(arguments: Any) -> str | None:
    """Arguments as the text of a JSON object, which clients expect.  None: not valid arguments."""
    if isinstance(arguments, str):
        if arguments.strip() in ("", "null"):
            return "{}"
        try:
            return arguments if isinstance(json.loads(arguments), dict) else None
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        return "{}"
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else None


def _named(text: str, match: re.Match[str] | None) -> list[Form] | None:
    calls = []
    while match:
        arguments, at = _decoder.raw_decode(text, match.end())
        calls.append(Form(match[1], json.dumps(arguments, ensure_ascii=False)))
        text = text[at:].lstrip(_SEPARATORS)
        match = _NAMED.match(text)
    return None if text else calls


def _tagged(text: str, tools: Mapping[str, Mapping[str, Any]]) -> list[Form] | None:
    """Calls of the form ``<function=name><parameter=key>value</parameter></function>``.

    Llama 3.1 writes the arguments as JSON inside ``<function=name>``.
    """
    calls = []
    while text:
        head, begin, text = text.partition("<function=")
        inside, _, text = text.partition("</function>")
        name, end, inside = inside.partition(">")
        if head.strip() or not begin or not end or not name.strip():
            return None
        if inside.lstrip().startswith("{"):
            arguments = object_text(inside.strip())
        else:
            parameters = _parameters(inside, tools.get(name.strip(), {}))
            arguments = None if parameters is None else json.dumps(parameters, ensure_ascii=False)
        if arguments is None:
            return None
        calls.append(Form(name.strip(), arguments))
        text = text.lstrip()
    return calls


def _parameters(text: str, schema: Mapping[str, Any]) -> dict[str, Any] | None:
    given: dict[str, Any] = {}
    properties = schema.get("properties")
    while text.strip():
        head, begin, text = text.partition("<parameter=")
        value, close, text = text.partition("</parameter>")
        key, end, value = value.partition(">")
        if head.strip() or not (begin and close and end):
            return None
        wanted = properties.get(key.strip()) if isinstance(properties, dict) else None
        value = value.removeprefix("\n").removesuffix("\n")
        given[key.strip()] = _value(value, wanted)
    return given


def _value(text: str, schema: Any) -> Any:
    """A value between tags.  It is read as JSON, unless the schema says that it is a string."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
