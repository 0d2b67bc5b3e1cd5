"""Chat templates: programs that come with a model's file, whose author nobody knows.

They are rendered in a process of their own (`bounded`), in jinja2's sandbox
(`template_rendering`).  Everything that renders a template does it here: `text.render_chat`, and
`SwiftLlama` with the server on it.
"""

from __future__ import annotations

from typing import Any

from swift_gguf.bounded import Bounded
from swift_gguf.errors import TemplateError


class ChatTemplate:
    """A template, and the process that renders it.

    source: Jinja.
    bos_token, eos_token: their text, for the template.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self._source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._process = Bounded()

    def render(self, **variables: Any) -> str:
        """The prompt; `variables` are what chat templates expect: messages, tools, ...

        Raises:
            TemplateError: the template refuses them, is none, or wants more than it gets.
        """
        values = {"add_generation_prompt": True, **self._tokens, **variables}
        try:
            answer = self._process.ask({"template": self._source, "variables": values})
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"the messages are no JSON: {error}") from error
        if "text" not in answer:
            raise TemplateError(f"the chat template fails: {answer['error']}")
        return str(answer["text"])

    def close(self) -> None:
        """Ends the process; another one starts when it is needed.  Safe to call twice."""
        self._process.close()
