"""llama_cpp's chat formats, with templates rendered where they can do no harm (`templates`).

llama_cpp's handlers pass on to the formatter what they do not know, and it to the template: so
comes what `Prompting` says.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from llama_cpp import llama_chat_format

from swift_gguf.errors import ModelError
from swift_gguf.templates import ChatTemplate, Prompting

CHATML: str = llama_chat_format.CHATML_CHAT_TEMPLATE
"""For models without a template."""
FOR_TOOLS = "chat_template.tool_use"
"""The handler of a second template, which some files have for chats with tools."""


class BoundedFormatter(llama_chat_format.Jinja2ChatFormatter):  # type: ignore[misc]
    """llama_cpp's formatter, but for who renders."""

    def __init__(self, template: str, eos_token: str, bos_token: str, **options: Any) -> None:
        super().__init__("", eos_token, bos_token, **options)  # compiles nothing
        self.template = template
        self._environment = _Rendering(ChatTemplate(template))


class _Rendering:
    """What llama_cpp takes for a compiled template."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def render(
        self, *, messages: Any, add_generation_prompt: bool, prompting: Any = None, **variables: Any
    ) -> str:
        """Functions among the variables are dropped: templates have their own."""
        return self._template.render(
            messages,
            prompting or Prompting(opens_answer=add_generation_prompt),
            **{name: value for name, value in variables.items() if not callable(value)},
        )


def templated_handler(llama: Any, *, has_tools: bool = False) -> Any:
    """What answers a llama's chats by its own chat template, and takes `Prompting`.

    has_tools: by the one for tools, if the file has such a one.

    Raises:
        ModelError: they go by something else.
    """
    own = _own_template(llama)
    if own is None:
        raise ModelError(
            "chats do not go by a chat template, which alone takes variables and continues "
            "messages; leave out chat_handler and chat_format, and use a model that has one"
        )
    handlers = llama._chat_handlers
    return handlers.get(FOR_TOOLS, handlers[own]) if has_tools else handlers[own]


def wants_other_template(llama: Any, tools: Any) -> bool:
    """Do these tools go into another template than llama_cpp would take?"""
    return bool(tools) and FOR_TOOLS in llama._chat_handlers and _own_template(llama) is not None


def _own_template(llama: Any) -> str | None:
    """The name of the handler of the template that chats go by; None: they go by something else."""
    guess = llama_chat_format.guess_chat_format_from_gguf_metadata(llama.metadata)
    own: str = llama.chat_format if llama.chat_format != guess else "chat_template.default"
    return own if llama.chat_handler is None and own in llama._chat_handlers else None


formats = SimpleNamespace(
    **{**vars(llama_chat_format), "Jinja2ChatFormatter": BoundedFormatter},
)
"""The module `llama_cpp.llama_chat_format`, as `Llama.__init__` is to find it."""
