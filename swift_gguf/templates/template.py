"""Chat templates: programs that come with a model's file, whose author nobody knows.

They are rendered in jinja2's sandbox, which keeps a template from attributes that lead out of it,
and that in a process of its own (`sandbox`), which keeps it from running for ever or making text
without end.  Everything that renders a template does it here: `text.render_chat`, and the drop-in
`Llama` with the server on it.
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
"""What of an answer goes on: what it says, or what it thinks."""

THINKS = {"on": True, "off": False, "auto": None}
"""Does a model think before it answers?  None: as its template has it."""

RESERVED = frozenset(
    {"messages", "add_generation_prompt", "bos_token", "eos_token"}
    | {"tools", "tool_choice", "functions", "function_call"}
)
"""Variables of a template that are no one's to set: a prompt says what the messages say."""


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """How a template makes a prompt of messages."""

    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further ones that the template may read: ``enable_thinking``, ``reasoning_effort``, ..."""
    opens_answer: bool = True
    """Does the prompt end where an answer begins?  Templates' `add_generation_prompt`."""
    continues: Continued | None = None
    """The last message is an answer, and the prompt ends in it: behind what it says or thinks."""

    def __post_init__(self) -> None:
        check_variables(self.variables)


def check_variables(variables: Mapping[str, Any]) -> None:
    """Variables for a template, as somebody wants to set them.

    Raises:
        TemplateError: they would put another prompt in the place of the messages.
    """
    taken = sorted(RESERVED.intersection(variables))
    if taken:
        raise TemplateError(f"{taken[0]!r} is not to be set: the prompt is made of the messages")
    thinks = variables.get("enable_thinking", True)
    if not isinstance(thinks, bool):  # to a template, "false" is true
        raise TemplateError(f"enable_thinking must be true or false, not {thinks!r}")


def parse_variables(text: str) -> dict[str, Any]:
    """Variables for a template, as a JSON object in text.

    Raises:
        TemplateError: it is none, or sets what is not to be set.
    """
    try:
        variables = json.loads(text)
    except (ValueError, RecursionError):
        variables = None
    if not isinstance(variables, dict):
        raise TemplateError(f'{text[:80]!r} is no JSON object such as {{"enable_thinking": false}}')
    check_variables(variables)
    return variables


def with_reasoning(
    variables: Mapping[str, Any], *, thinks: bool | None = None, effort: str | None = None
) -> dict[str, Any]:
    """Variables that also tell the template whether the model is to think, and how hard.

    thinks: None: as the variables, or the template, have it.
    effort: ``low``, ``high``, ...; ``none``: without thoughts, unless `thinks` says otherwise.

    Templates have two names for each: Qwen's and most others', DeepSeek's and a few others'.
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

    source: Jinja.
    bos_token, eos_token: their text, for the template.
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
        """The prompt; `more` is what chat templates expect beside the messages: tools, ...

        Raises:
            TemplateError: the template refuses them, is none, or wants more than it gets; or it
                does not show the answer that is to go on.
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
            raise TemplateError(f"the messages are no JSON: {error}") from error
        if "text" not in answer:
            raise TemplateError(f"the chat template fails: {answer['error']}")
        return str(answer["text"])

    def close(self) -> None:
        """Ends the process; another one starts when it is needed.  Safe to call twice."""
        self._process.close()


def _marked(
    messages: Sequence[Mapping[str, Any]], continues: Continued, mark: str
) -> list[Mapping[str, Any]]:
    """The messages, with a mark where the last one is to be continued.

    Raises:
        TemplateError: it is no answer, or one that calls tools, or has no text.
    """
    *before, last = messages or [{}]
    if last.get("role") != "assistant" or last.get("tool_calls"):
        raise TemplateError(
            "only an assistant's message without tool calls can be continued, as the last one"
        )
    value = last.get(continues) or ""
    if isinstance(value, list):  # parts
        value = "".join(str(part.get("text", "")) for part in value if isinstance(part, dict))
    return [*before, {**last, continues: f"{value}{mark}"}]


# -- in the process of its own --------------------------------------------------------------------

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
