"""llama_cpp's chat formats, with templates rendered where they can do no harm (`templates`)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from llama_cpp import llama_chat_format

from swift_gguf.templates import ChatTemplate


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

    def render(self, **variables: Any) -> str:
        """Functions among the variables are dropped: templates have their own."""
        return self._template.render(
            **{name: value for name, value in variables.items() if not callable(value)}
        )


formats = SimpleNamespace(
    **{**vars(llama_chat_format), "Jinja2ChatFormatter": BoundedFormatter},
)
"""The module `llama_cpp.llama_chat_format`, as `Llama.__init__` is to find it."""
