"""Forms that chat answers are asked for in: schemas held by us, where llama_cpp would convert them.

llama_cpp's converter loses constraints, and where it fails, any JSON comes without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import FunctionType, SimpleNamespace
from typing import Any

from llama_cpp import llama_grammar

from swift_gguf.errors import SchemaError
from swift_gguf.llama.adoption import in_scope
from swift_gguf.schemas.constraint import Constraint, arguments_of, json_by

ANY_OBJECT: dict[str, Any] = {"type": "object"}


class _Held:
    """llama_cpp's `LlamaGrammar`, as its chat handlers use it."""

    from_string = llama_grammar.LlamaGrammar.from_string

    @staticmethod
    def from_json_schema(schema: str, **_: Any) -> Constraint:
        """Of the arguments of the one tool that must be called."""
        return arguments_of("", json.loads(schema))


converter = SimpleNamespace(**{**vars(llama_grammar), "LlamaGrammar": _Held})
"""The module `llama_cpp.llama_grammar`, as its chat handlers are to find it."""


def held(handler: Any, arguments: dict[str, Any]) -> Any:
    """A chat handler of llama_cpp's that holds answers to the form that is asked for.

    arguments: of the handler; a ``response_format`` becomes a ``grammar``.

    Raises:
        SchemaError: the form is not supported.
    """
    form = response_form(arguments.pop("response_format"))
    if form is not None:
        arguments["grammar"] = form
    check_named(arguments)
    scope = handler.__globals__ if isinstance(handler, FunctionType) else {}
    if scope.get("llama_grammar") is not llama_grammar:
        return handler
    return in_scope(handler, {**scope, "llama_grammar": converter})


def response_form(response_format: Any) -> Constraint | None:
    """What a ``response_format`` holds the answer to: ``json_object`` (with or without a
    ``schema``), ``json_schema``; None for text.

    Raises:
        SchemaError: it is not supported.
    """
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "json_object":
        schema = response_format.get("schema")
    elif kind == "json_schema":
        schema = (response_format.get("json_schema") or {}).get("schema")
        if schema is None:
            raise SchemaError("response_format: json_schema needs a schema")
    else:
        return None
    return json_by(ANY_OBJECT if schema is None else schema)


def check_named(arguments: Mapping[str, Any]) -> None:
    """Can the arguments of the one tool be held that must be called?

    llama_cpp's handlers would take any JSON without a word.

    arguments: of `Llama.create_chat_completion`.

    Raises:
        SchemaError: they cannot.
    """
    choice, call = arguments.get("tool_choice"), arguments.get("function_call")
    functions = [tool.get("function", {}) for tool in arguments.get("tools") or ()]
    functions = arguments.get("functions") or functions
    name = None
    if isinstance(choice, Mapping):
        name = choice.get("function", {}).get("name")
    if isinstance(call, Mapping):
        name = call.get("name")
    for function in functions:
        if name is not None and function.get("name") == name:
            arguments_of(name, function.get("parameters"))
