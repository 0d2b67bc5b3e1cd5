"""Chat templates: they turn messages into a prompt.  Untrusted, so they run in a sandbox."""

from swift_gguf.templates.template import (
    THINKS,
    ChatTemplate,
    Continued,
    Prompting,
    check_variables,
    parse_variables,
    with_reasoning,
)

__all__ = [
    "THINKS",
    "ChatTemplate",
    "Continued",
    "Prompting",
    "check_variables",
    "parse_variables",
    "with_reasoning",
]
