"""Chat templates in jinja2's sandbox.

That keeps a template from attributes that lead out of it, but not from running for ever or from
making text without end: `bounded_worker` sees to that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEXT = 8 << 20
"""Characters of a prompt: more than the longest context takes, and little to read."""


class _Generation(Extension):
    """``{% generation %}`` marks what a model is trained on; for a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012 (so in jinja2)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        # jinja2 goes on with nothing instead; who reaches for such names wants out
        raise SecurityError(f"it reaches for {attribute!r}, which templates may not")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As chat templates expect it: unlike jinja2's own, nothing is escaped for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The prompt.

    Raises:
        ValueError: it is too long.
        Exception: whatever the template trips over.
    """
    text = _compiled(source).render(variables)
    if len(text) > MAX_TEXT:
        raise ValueError(f"it makes a prompt of more than {MAX_TEXT} characters")
    return text
