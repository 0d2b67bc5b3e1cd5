"""ROOM text."""

from swift_gguf.text.templates import (
    THINKS,
    ChatTemplate,
    Continued,
    Prompting,
    check_variables,
    parse_variables,
    with_reasoning,
)
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
    "THINKS",
    "ChatTemplate",
    "Continued",
    "Message",
    "Prompting",
    "StreamDecoder",
    "chat_template",
    "check_variables",
    "encode",
    "one_bos",
    "parse_variables",
    "piece",
    "read_prompt",
    "read_template",
    "render_chat",
    "splittable",
    "with_reasoning",
]
