"""llama_cpp's chat formats, with templates rendered where they can do no harm (`templates`).

llama_cpp's handlers pass on to the formatter what they do not know, and it to the template: so
comes what `Prompting` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from llama_cpp import llama_chat_format

from swift_gguf.errors import ModelError
from swift_gguf.llama.adoption import in_scope
from swift_gguf.llama.forms import converter
from swift_gguf.llama.scores import LogProbs
from swift_gguf.templates import ChatTemplate, Prompting

CHATML: str = llama_chat_format.CHATML_CHAT_TEMPLATE
"""For models without a template."""
FOR_TOOLS = "chat_template.tool_use"
"""The handler of a second template, which some files have for chats with tools."""


class BoundedFormatter(llama_chat_format.Jinja2ChatFormatter):  # type: ignore[misc]
    """llama_cpp's formatter, but for who renders; prompts get the start token that the vocabulary
    adds where the template does not write it, and an answer goes on beyond the text of the end
    token: ends of generation are known by token.

    stop: texts that end an answer, of formats whose end is no token of the model.
    """

    def __init__(
        self,
        template: str,
        eos_token: str,
        bos_token: str,
        *,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        """stop_token_ids: llama_cpp's end token, which is one that llama.cpp knows anyway."""
        super().__init__("", eos_token, bos_token)  # compiles nothing
        self._stop = list(stop)
        self.template = template
        self._environment = _Rendering(ChatTemplate(template))

    def __call__(
        self, *, adds_start: bool = False, **arguments: Any
    ) -> llama_chat_format.ChatFormatterResponse:
        """See `Jinja2ChatFormatter.__call__`.

        adds_start: does the vocabulary put its start token before a text?
        """
        prompt = super().__call__(**arguments).prompt
        if adds_start and not prompt.startswith(self.bos_token):
            prompt = self.bos_token + prompt
        return llama_chat_format.ChatFormatterResponse(
            prompt=prompt, stop=self._stop, added_special=True
        )

    def to_chat_handler(self) -> Any:
        """See `Jinja2ChatFormatter.to_chat_handler`."""
        handle = _handler_of(self)

        def handler(*, llama: Any, **arguments: Any) -> Any:
            return handle(llama=llama, adds_start=llama._model.add_bos_token(), **arguments)

        return handler


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
    own: str = llama.chat_format
    return own if llama.chat_handler is None and own in llama._chat_handlers else None


def _logprobs(given: LogProbs | None) -> dict[str, Any] | None:
    """Of a chat, where those of the completion are ours: with bytes, and as many as were asked."""
    return None if given is None else {"content": given.content, "refusal": None}


_scope = {
    **vars(llama_chat_format),
    "_convert_text_completion_logprobs_to_chat": _logprobs,
    "llama_grammar": converter,
}
for _name in (
    "_convert_text_completion_to_chat",
    "_convert_text_completion_chunks_to_chat",
    "_convert_completion_to_chat",
    "_convert_completion_to_chat_function",
    "chat_formatter_to_chat_completion_handler",
):
    _scope[_name] = in_scope(getattr(llama_chat_format, _name), _scope)
_handler_of = _scope["chat_formatter_to_chat_completion_handler"]

formats = SimpleNamespace(
    **{
        **vars(llama_chat_format),
        "Jinja2ChatFormatter": BoundedFormatter,
        # a model's own template says more than the format that llama_cpp takes it for
        "guess_chat_format_from_gguf_metadata": lambda _: None,
    }
)
"""The module `llama_cpp.llama_chat_format`, as `Llama.__init__` is to find it."""
