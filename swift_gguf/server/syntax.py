"""The syntax of answers that a chat template implies, found out by llama.cpp.

llama.cpp renders the template many times, in the process where templates are rendered (`sandbox`).
The result is data: a parser of answers, and the text of the control tokens that it needs.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swift_gguf.native.chat import Reader
from swift_gguf.templates.sandbox import Sandbox

_log = logging.getLogger("swift_gguf")

MAX_KEPT = 32
"""Syntaxes that are kept; each belongs to a template and a set of tools."""
_TYPES = ["string", "integer", "number", "boolean", "null", "array", "object"]
_MESSAGES = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True, kw_only=True)
class Syntax:
    """What llama.cpp found out about a template."""

    reader: Reader
    opening: str
    """The beginning of an answer that is in the prompt: its header, and the mark that opens the
    reasoning."""
    thinking: str
    """The mark that opens the reasoning; empty if the template has none."""
    shown: tuple[str, ...]
    """Control tokens that are part of the syntax, as text."""
    stops: tuple[str, ...]


class Syntaxes:
    """A cache of the syntaxes of templates.

    bos_token, eos_token: the text of these tokens, for the templates.
    """

    def __init__(self, *, bos_token: str = "", eos_token: str = "") -> None:
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._known: OrderedDict[str, Syntax | None] = OrderedDict()
        self._hopeless: set[str] = set()
        """Templates that ended the process which analysed them."""

    def of(
        self,
        template: str,
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
    ) -> Syntax | None:
        """The syntax of answers to a request with these tools; None if it is not known.

        variables: further variables of the template.
        """
        if template in self._hopeless:
            return None
        request: dict[str, Any] = {
            "template": template,
            **self._tokens,
            "messages": _MESSAGES,
            "tools": list(tools),
            "variables": dict(variables or {}),
        }
        thinks = request["variables"].get("enable_thinking")
        if isinstance(thinks, bool):
            request["enable_thinking"] = thinks
        key = json.dumps(request)
        if key not in self._known:
            self._known[key] = self._ask(template, request)
            while len(self._known) > MAX_KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _ask(self, template: str, request: Mapping[str, Any]) -> Syntax | None:
        if getattr(sys, "frozen", False):
            return None  # a frozen program cannot start the process (`Sandbox`)
        process = Sandbox("swift_gguf.native.chat", "analyse")
        try:
            answer = process.ask(request=request)
        finally:
            process.close()  # the result is cached, so the process is not needed again
        if "text" not in answer:
            self._hopeless.add(template)
            _log.warning("cannot analyse the chat template's syntax: %s", answer["error"])
            return None
        found = json.loads(answer["text"])
        if "error" in found:
            plain = {**request, "tools": [_plainly(tool) for tool in request["tools"]]}
            if plain != request:  # llama.cpp may not understand a schema
                return self._ask(template, plain)
            _log.info("cannot analyse the chat template's syntax: %s", found["error"])
            return None
        return Syntax(
            reader=Reader(answer["text"]),
            opening=found["generation_prompt"],
            thinking=found["thinking_start"],
            shown=tuple(found["preserved_tokens"]),
            stops=tuple(found["stops"]),
        )


def _plainly(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool with only the names and types of its parameters, which a parser needs."""
    function = tool["function"]
    properties = function.get("parameters", {}).get("properties")
    types = {
        name: {"type": schema["type"]}
        if isinstance(schema, dict) and schema.get("type") in _TYPES
        else {}
        for name, schema in (properties.items() if isinstance(properties, dict) else ())
    }
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "parameters": {"type": "object", "properties": types},
        },
    }
