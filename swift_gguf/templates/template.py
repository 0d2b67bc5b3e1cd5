"""Renders chat templates: untrusted programs that come with a model file.

Two sandboxes protect against them.  jinja2's own keeps a template away from Python's internals.
The process around it (`sandbox`) limits its time and its memory.  All templates are rendered here:
for `text.render_chat`, for the drop-in `Llama`, and for the server.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from swift_gguf.errors import TemplateError
from swift_gguf.templates.sandbox import Sandbox

Continued = Literal["content", "reasoning_content"]
"""The part of an unfinished answer that is continued: its text or its thoughts."""

THINKS = {"on": True, "off": False, "auto": None}
"""Whether the model thinks before it answers; None: the template decides."""

RESERVED = frozenset(
    {"messages", "add_generation_prompt", "bos_token", "eos_token"}
    | {"tools", "tool_choice", "functions", "function_call"}
)
"""Template variables that users cannot set, because they come from the messages and the model."""


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """Options for rendering messages into a prompt."""

    variables: Mapping[str, Any] = field(default_factory=dict)
    """More template variables: ``enable_thinking``, ``reasoning_effort``, ..."""
    opens_answer: bool = True
    """The prompt ends where an answer begins: the template's `add_generation_prompt`."""
    continues: Continued | None = None
    """The last message is an unfinished answer: the prompt ends after this part of it."""

    def __post_init__(self) -> None:
        check_variables(self.variables)


def check_variables(variables: Mapping[str, Any]) -> None:
    """Checks variables that a user sets.

    Raises:
        TemplateError: a name is reserved, or `enable_thinking` is not a boolean.
    """
    taken = sorted(RESERVED.intersection(variables))
    if taken:
        raise TemplateError(f"{taken[0]!r} cannot be set: it comes from the messages")
    thinks = variables.get("enable_thinking", True)
    if not isinstance(thinks, bool):  # in a template, the string "false" is true
        raise TemplateError(f"enable_thinking must be true or false, not {thinks!r}")


def parse_variables(text: str) -> dict[str, Any]:
    """Template variables from the text of a JSON object.

    Raises:
        TemplateError: it is not a JSON object, or sets a reserved name.
    """
    try:
        variables = json.loads(text)
    except (ValueError, RecursionError):
        variables = None
    if not isinstance(variables, dict):
        raise TemplateError(
            f'{text[:80]!r} is not a JSON object such as {{"enable_thinking": false}}'
        )
    check_variables(variables)
    return variables


def with_reasoning(
    variables: Mapping[str, Any], *, thinks: bool | None = None, effort: str | None = None
) -> dict[str, Any]:
    """The variables, with those that control thinking.

    thinks: whether the model thinks; None: the variables or the template decide.
    effort: ``low``, ``high``, ...; ``none``: no thoughts, unless `thinks` is true.

    Each setting has two names: one in Qwen's and most other templates, one in DeepSeek's and a few
    others.
    """
    told = dict(variables)
    if effort == "none":
        thinks = thinks or False
    if thinks is not None:
        told |= {"enable_thinking": thinks, "thinking": thinks}
    if effort == "none":
        for name in ("reasoning_effort", "reasoning_strength"):
            told.pop(name, None)
    elif effort is not None:
        told |= {"reasoning_effort": effort, "reasoning_strength": effort}
    return told


class ChatTemplate:
    """A template, and the process that renders it.

    source: the template in Jinja.
    bos_token, eos_token: the text of these tokens.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self._source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._process = Sandbox(__name__, "render")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]] = (),
        prompting: Prompting | None = None,
        **more: Any,
    ) -> str:
        """The prompt for the messages.

        more: further variables that chat templates expect: tools, ...

        Raises:
            TemplateError: the template is invalid, rejects the messages, exceeds a limit, or does
                not show the answer to be continued.
        """
        prompting = prompting or Prompting()
        values = {
            **self._tokens,
            **prompting.variables,
            **more,
            "add_generation_prompt": prompting.opens_answer and prompting.continues is None,
        }
        if prompting.continues is None:
            return self._rendered({**values, "messages": list(messages)})
        mark = f"\ue000{uuid.uuid4().hex}\ue001"
        marked = _marked(messages, prompting.continues, mark)
        text, *rest = self._rendered({**values, "messages": marked}).split(mark)
        if len(rest) != 1:
            raise TemplateError(
                f"the chat template does not show the {prompting.continues} of the last message "
                "as it is, so it cannot be continued"
            )
        return text

    def _rendered(self, variables: dict[str, Any]) -> str:
        try:
            answer = self._process.ask(source=self._source, variables=variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"the messages cannot be written as JSON: {error}") from error
        if "text" not in answer:
            raise TemplateError(f"the chat template fails: {answer['error']}")
        return str(answer["text"])

    def close(self) -> None:
        """Ends the process; a new one starts when needed.  May be called twice."""
        self._process.close()


def _marked(
    messages: Sequence[Mapping[str, Any]], continues: Continued, mark: str
) -> list[Mapping[str, Any]]:
    """The messages, with a mark where the last one is continued.

    Raises:
        TemplateError: the last message is not an answer, or it calls tools.
    """
    *before, last = messages or [{}]
    if last.get("role") != "assistant" or last.get("tool_calls"):
        raise TemplateError(
            "only an assistant's message without tool calls can be continued; it must be the last"
        )
    value = last.get(continues) or ""
    if isinstance(value, list):  # parts
        value = "".join(str(part.get("text", "")) for part in value if isinstance(part, dict))
    return [*before, {**last, continues: f"{value}{mark}"}]


# -- inside the sandbox's process ------------------------------------------------------------------

MAX_TEXT = 8 << 20
"""Maximum characters of a prompt; more than the longest context holds."""


class _Generation(Extension):
    """Ignores ``{% generation %}``, which marks text for training."""

    tags = {"generation"}  # noqa: RUF012 (so in jinja2)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        # jinja2 would return an undefined value; but such a name is an attempt to escape
        raise SecurityError(f"it uses {attribute!r}, which is not allowed in templates")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it; unlike jinja2's filter, it does not escape HTML."""
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
    """Renders a template; runs in the sandbox's process.

    Raises:
        ValueError: the prompt is too long.
        Exception: any error of the template.
    """
    text = _compiled(source).render(variables)
    if len(text) > MAX_TEXT:
        raise ValueError(f"it makes a prompt of more than {MAX_TEXT} characters")
    return text
