"""How a model's chat template has answers written, as llama.cpp finds out.

It renders the template many times, which happens where templates are rendered (`sandbox`).  What
comes back is data: a reader of answers, and the text of the tokens that readers must see.
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
"""Syntaxes; each belongs to a template and a set of tools."""
_TYPES = ["string", "integer", "number", "boolean", "null", "array", "object"]
_MESSAGES = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True, kw_only=True)
class Syntax:
    """What llama.cpp says of a template."""

    reader: Reader
    opening: str
    """What the prompt has of an answer before the model says anything: its header, and what opens
    its thoughts."""
    thinking: str
    """What opens thoughts; empty where the template says nothing of them."""
    shown: tuple[str, ...]
    """Control tokens that are part of the syntax, as text."""
    stops: tuple[str, ...]


class Syntaxes:
    """Syntaxes of templates, remembered.

    bos_token, eos_token: their text, for the templates.
    """

    def __init__(self, *, bos_token: str = "", eos_token: str = "") -> None:
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._known: OrderedDict[str, Syntax | None] = OrderedDict()
        self._hopeless: set[str] = set()
        """Templates that ended the process that looked at them."""

    def of(
        self,
        template: str,
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
    ) -> Syntax | None:
        """How answers to a request with these tools are written; None where that is not known.

        variables: what else the template is given.
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
            return None  # there is no process to look at it in (`Sandbox`)
        process = Sandbox("swift_gguf.native.chat", "analyse")
        try:
            answer = process.ask(request=request)
        finally:
            process.close()  # what it finds out is remembered: it has nothing more to do
        if "text" not in answer:
            self._hopeless.add(template)
            _log.warning("the chat template's syntax is not known: %s", answer["error"])
            return None
        found = json.loads(answer["text"])
        if "error" in found:
            plain = {**request, "tools": [_plainly(tool) for tool in request["tools"]]}
            if plain != request:  # a schema that llama.cpp does not understand, perhaps
                return self._ask(template, plain)
            _log.info("the chat template's syntax is not known: %s", found["error"])
            return None
        return Syntax(
            reader=Reader(answer["text"]),
            opening=found["generation_prompt"],
            thinking=found["thinking_start"],
            shown=tuple(found["preserved_tokens"]),
            stops=tuple(found["stops"]),
        )


def _plainly(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool with no more of its parameters than their names and types, which a reader needs."""
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
