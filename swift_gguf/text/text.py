"""Tokenizer, streaming detokenizer, and chat prompts."""

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
"""Maximum size in bytes of a text that can be tokenised."""

Message = Mapping[str, str]
"""``{"role": "system" | "user" | "assistant", "content": ...}``."""


def encode(model: Model, text: str, *, special: bool = True, start: bool = True) -> list[int]:
    """Token ids of `text`, with the BOS token if the model has one.

    special: parse control tokens such as ``<|im_start|>``.
    start: False for text that follows other tokens: no BOS token.
    """
    ids = library().tokenize(
        model.vocab,
        text.encode("utf-8", "surrogateescape"),
        add_special=start,
        parse_special=special,
    )
    api, vocab = library().api, model.vocab
    if start and api.llama_vocab_get_add_eos(vocab) and ids[-1:] == [api.llama_vocab_eos(vocab)]:
        ids.pop()  # the text will be continued, so it must not end with EOS
    return one_bos(ids, api.llama_vocab_bos(vocab))


def one_bos(ids: list[int], bos: int) -> list[int]:
    """Removes the second BOS token: the text may contain one, and the tokenizer adds one."""
    return ids[1:] if ids[:2] == [bos, bos] else ids


def piece(model: Model, token: int, *, special: bool = False) -> bytes:
    """The bytes of a token.

    special: also return the text of control tokens.
    """
    return library().token_bytes(model.vocab, token, special=special)


class StreamDecoder:
    """Turns tokens into text.  A character of several tokens comes with its last token."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        return self._utf8.decode(piece(self._model, token))

    def finish(self) -> str:
        """The rest after the last token: a replacement character if a character is incomplete."""
        return self._utf8.decode(b"", final=True)


def chat_template(model: Model) -> str | None:
    """The Jinja template in the model's file; None if there is none (a base model)."""
    return model.metadata("tokenizer.chat_template")


def render_chat(
    model: Model,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    prompting: Prompting | None = None,
) -> str:
    """The prompt for the assistant's answer to these messages.

    template: a Jinja template that replaces the model's own.
    prompting: the template's other variables, and where the prompt ends.

    Raises:
        ModelError: the model has no template.
        TemplateError: the template is invalid, rejects the messages, or exceeds its time or memory
            limit.
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


@lru_cache(maxsize=4)  # each entry keeps a process
def _template(source: str, start: str, end: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token=start, eos_token=end)


def read_template(value: str) -> str:
    """A template, given as text or as the path of a file."""
    if "{" in value:
        return value
    try:
        return read_text(value)
    except SwiftError as error:
        raise SwiftError(
            f"the chat template is neither Jinja text nor a file that can be read: {error}"
        ) from error


def read_prompt(path: Path, *, pipes: bool = True) -> str:
    """The text of a file that is short enough to be tokenised; see `read_text`.

    Raises:
        SwiftError: the file cannot be read, or its text is too long.
    """
    return splittable(read_text(path, limit=MOST_BYTES, pipes=pipes), str(path))


def splittable(text: str, name: str) -> str:
    """Returns the text if it is short enough to be tokenised.

    name: the source of the text, for the error message.

    Raises:
        SwiftError: the text is too long.
    """
    if len(text) > MOST:
        raise SwiftError(
            f"{name} is too long: it has {len(text)} characters, but at most {MOST} can be "
            "tokenised; give a part of it"
        )
    return text
