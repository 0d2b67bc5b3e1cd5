"""Schemas and tools as clients send them: what is sampled fits, what is not supported is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.conftest import Server
from tests.server.test_limits import CHAT, HELLO, told

REFERRING = {
    "type": "object",
    "properties": {"to": {"$ref": "#/$defs/P"}},
    "required": ["to"],
    "$defs": {"P": {"enum": ["x"]}},
}
OTHER = {**REFERRING, "$defs": {"P": {"enum": [5]}}}


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def answer(server: Server, **fields: Any) -> dict[str, Any]:
    status, body = server.post(CHAT, {"messages": HELLO, "max_tokens": 200, "seed": 1, **fields})
    assert status == 200, body
    choice: dict[str, Any] = body["choices"][0]
    return choice


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize("choice", ["required", named("f"), named("g")], ids=str)
def test_tools_have_their_own_references(server: Server, choice: Any) -> None:
    tools = [tool("f", REFERRING), tool("g", OTHER)]
    made = answer(server, tools=tools, tool_choice=choice, temperature=1.5)
    assert made["finish_reason"] == "tool_calls"
    (call,) = made["message"]["tool_calls"]
    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    assert arguments == {"to": {"f": "x", "g": 5}[name]}
    assert choice == "required" or name == choice["function"]["name"]


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"const": '<|im_end|> \n "\\ 😀'}, ['<|im_end|> \n "\\ 😀']),
        ({"type": ["string", "null"], "enum": ["red", None]}, ["red", None]),
        ({"type": "integer", "minimum": 1, "maximum": 3}, [1, 2, 3]),
        ({"allOf": [{"$ref": "#/$defs/E"}], "$defs": {"E": {"enum": ["a"]}}}, ["a"]),
        ({"type": "string", "pattern": r"^\d$"}, list("0123456789")),
    ],
    ids=str,
)
def test_answers_fit(server: Server, schema: Any, values: list[Any]) -> None:
    for seed in range(3):
        made = answer(server, response_format=form(schema), seed=seed, temperature=1.5)
        assert json.loads(made["message"]["content"]) in values


def test_any_value(server: Server) -> None:
    for schema in (True, {}, {"title": "X"}):
        made = answer(server, response_format=form(schema), max_tokens=8, temperature=1.5)
        assert made["message"]["content"]


def test_a_schema_or_calls(server: Server) -> None:
    """What a model means by itself it may say: the answer, or calls."""
    said = set()
    for seed in range(12):
        made = answer(
            server,
            response_format=form({"const": "<no call>"}),
            tools=[tool("f", REFERRING)],
            temperature=1.5,
            seed=seed,
        )
        if made["finish_reason"] == "tool_calls":
            for call in made["message"]["tool_calls"]:
                assert json.loads(call["function"]["arguments"]) == {"to": "x"}
        elif made["finish_reason"] == "stop":
            assert json.loads(made["message"]["content"]) == "<no call>"
        said.add(made["finish_reason"])
    assert said & {"tool_calls", "stop"}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"response_format": form({"properties": {"tags": {"uniqueItems": True}}})},
            "response_format",
            "response_format: properties.tags: uniqueItems is not supported; leave it out",
        ),
        (
            {"tools": [tool("f", {"not": {}})], "tool_choice": "required"},
            "tools",
            "tools: f: not is not supported; leave it out",
        ),
        (
            {"tools": [tool("f", {"not": {}})], "response_format": form({})},
            "tools",
            "tools: f: not is not supported; leave it out",
        ),
        (
            {"tools": [tool("f", {"type": "string"})], "tool_choice": "required"},
            "tools",
            "tools: f: type of the parameters must be object",
        ),
        (
            {"response_format": form(False)},
            "response_format",
            "response_format: the schema allows no value",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_held_is_named(
    server: Server, fields: dict[str, Any], param: str, message: str
) -> None:
    error = told(*server.post(CHAT, {"messages": HELLO, **fields}))
    assert (error["param"], error["message"]) == (param, message)


def test_tools_of_a_hundred_kilobytes(server: Server) -> None:
    text = {"type": "object", "properties": {"a": {"type": "string", "description": "x" * 900}}}
    made = answer(server, tools=[tool(f"t{i}", text) for i in range(90)], tool_choice="required")
    assert made["finish_reason"] in ("tool_calls", "length")
