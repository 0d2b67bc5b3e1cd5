"""Tokenizer and detokenizer, chat prompts, and the separation of thoughts from answers."""

from swift_gguf.text.text import (
    MOST_BYTES,
    Message,
    StreamDecoder,
    chat_template,
    encode,
    one_bos,
    piece,
    read_prompt,
    read_template,
    render_chat,
    splittable,
)

__all__ = [
    "MOST_BYTES",
    "Message",
    "StreamDecoder",
    "chat_template",
    "encode",
    "one_bos",
    "piece",
    "read_prompt",
    "read_template",
    "render_chat",
    "splittable",
]
