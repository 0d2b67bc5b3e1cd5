"""The process that renders chat templates: a sandbox with an end to time and memory.

jinja2's sandbox keeps a template from attributes that lead out of it, but not from running for ever
or from making text without end; most of that happens inside single operations of Python's, which
nothing within the process can break off.  Here the system does: a timer ends the process, and more
memory is not to be had.

Requests and answers are lines of JSON: {"template", "variables"} and {"text"} or {"error"}.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
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

CPU_S = 2.0
"""Seconds of the processor's for one rendering; an ordinary one takes thousandths."""
MEMORY = 512 << 20
"""Bytes of addresses, some 50 MB of them Python's own."""
MAX_TEXT = 32 << 20
"""Characters of a prompt: more than the longest context takes."""


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


def render(source: str, variables: Mapping[str, Any]) -> dict[str, str]:
    """The answer to a request; whatever a template trips over is an error of its own."""
    try:
        text = _compiled(source).render(variables)
        if len(text) > MAX_TEXT:
            return {"error": f"it makes a prompt of more than {MAX_TEXT} characters"}
        return {"text": text}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MB"}
    except RecursionError:
        return {"error": "it is nested too deep, or calls itself without end"}
    except Exception as error:
        return {"error": " ".join(str(error).split())[:300] or type(error).__name__}


def _limit_resources() -> None:
    """For good: what is rendered later starts with what this leaves."""
    for name, value in (("AS", MEMORY), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)):
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


def main() -> None:
    """Answers requests until there are no more."""
    _limit_resources()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal ends the process
        request = json.loads(line)
        answer = json.dumps(render(request["template"], request["variables"]))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
