"""Text in, token ids out, and back: tokenizer, streaming detokenizer, chat template."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from swift_gguf.errors import ModelError, SwiftError, TemplateError
from swift_gguf.model import Model
from swift_gguf.native import library
from swift_gguf.native.deep_stack import MOST
from swift_gguf.templates import ChatTemplate, Prompting
from swift_gguf.text_files import read_text

MOST_BYTES = 4 * MOST
"""Of a text that can be split into tokens."""

Message = Mapping[str, str]
"""``{"role": "system" | "user" | "assistant", "content": ...}``."""


def encode(model: Model, text: str, *, special: bool = True, start: bool = True) -> list[int]:
    """Token ids of `text`, with the model's own start token.

    special: read ``<|im_start|>`` and the like as the control tokens they name.
    start: False for text that goes on after other tokens.
    """
    ids = library().tokenize(
        model.vocab,
        text.encode("utf-8", "surrogateescape"),
        add_special=start,
        parse_special=special,
    )
    api, vocab = library().api, model.vocab
    if start and api.llama_vocab_get_add_eos(vocab) and ids[-1:] == [api.llama_vocab_eos(vocab)]:
        ids.pop()  # what is to be gone on with has not ended
    return one_bos(ids, api.llama_vocab_bos(vocab))


def one_bos(ids: list[int], bos: int) -> list[int]:
    """Tokens of a text that may write the start token itself, where the vocabulary adds one."""
    return ids[1:] if ids[:2] == [bos, bos] else ids


def piece(model: Model, token: int, *, special: bool = False) -> bytes:
    """The bytes a token stands for; special: show control tokens too."""
    return library().token_bytes(model.vocab, token, special=special)


class StreamDecoder:
    """Tokens to text; a character split over several tokens comes with the last of them."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        return self._utf8.decode(piece(self._model, token))

    def finish(self) -> str:
        """What is left when no token follows: a replacement character for a torn one."""
        return self._utf8.decode(b"", final=True)


def chat_template(model: Model) -> str | None:
    """The Jinja template in the model's file, or None for a base model."""
    return model.metadata("tokenizer.chat_template")


def render_chat(
    model: Model,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    prompting: Prompting | None = None,
) -> str:
    """The prompt for these messages, ready for the assistant's answer.

    template: a Jinja template instead of the model's own.
    prompting: what else the template is told, and where the prompt ends.

    Raises:
        ModelError: the model has no template.
        TemplateError: it is none, refuses the messages, or wants more time or memory than it gets.
    """
    source = template or chat_template(model)
    if source is None:
        raise ModelError(
            f"{model.path} has no chat template; use --raw, or give one with --chat-template"
        )
    api = library().api
    start, end = (
        piece(model, token, special=True).decode("utf-8", "replace") if token >= 0 else ""
        for token in (api.llama_vocab_bos(model.vocab), api.llama_vocab_eos(model.vocab))
    )
    try:
        return _template(source, start, end).render(messages, prompting)
    except TemplateError as error:
        raise TemplateError(f"{error}; try --raw or --chat-template") from error


@lru_cache(maxsize=4)  # each keeps a process
def _template(source: str, start: str, end: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token=start, eos_token=end)


def read_template(value: str) -> str:
    """A template given as text, or as the path of a file that holds it."""
    if "{" in value:
        return value
    try:
        return read_text(value)
    except SwiftError as error:
        raise SwiftError(
            f"the chat template is neither Jinja text nor a file that can be read: {error}"
        ) from error


def read_prompt(path: Path, *, pipes: bool = True) -> str:
    """A text file whose text can be split into tokens; see `read_text`.

    Raises:
        SwiftError: it cannot be read, or is longer than any text that can be split.
    """
    return splittable(read_text(path, limit=MOST_BYTES, pipes=pipes), str(path))


def splittable(text: str, name: str) -> str:
    """The text.

    name: what it is from, for the message.

    Raises:
        SwiftError: it is too long to be split into tokens.
    """
    if len(text) > MOST:
        raise SwiftError(
            f"{name} is too long: it has {len(text)} characters, and at most {MOST} can be split "
            "into tokens; give a part of it"
        )
    return text
