"""Finds the EOS token if the file does not name one.

For BPE vocabularies llama.cpp then takes token 11, which is GPT-4's.  In most other vocabularies it
is a comma, and every answer would end at its first comma.
"""

from __future__ import annotations

import logging
from pathlib import Path

from swift_gguf.gguf.header import Header

EOS_KEY = "tokenizer.ggml.eos_token_id"

_DEFAULT = 11
# end tokens by name: first those that end a turn, then those that end a text
_ENDS = (
    b"<|im_end|>",
    b"<|eot_id|>",
    b"<|end|>",
    b"<end_of_turn>",
    b"<|return|>",
    b"<|eom_id|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>".encode(),
    b"<|endoftext|>",
    b"<|end_of_text|>",
    b"</s>",
    b"<eos>",
)

_log = logging.getLogger("swift_gguf")


def end_token(header: Header) -> int | None:
    """The EOS token to use instead of llama.cpp's default; None: keep the default."""
    if _names_one(header):
        return None
    template = header.metadata.get("tokenizer.chat_template")
    text = template.encode("utf-8", "replace") if isinstance(template, str) else b""
    known = [end for end in _ENDS if end in header.tokens]
    named = [end for end in known if end in text]
    ends = named or known
    return header.tokens.index(ends[0]) if ends else None


def overrides(header: Header, path: Path | str) -> dict[str, int]:
    """Metadata that overrides the file's, and logs a warning."""
    if _names_one(header) or len(header.tokens) <= _DEFAULT:
        return {}
    if (token := end_token(header)) is None:
        text = header.tokens[_DEFAULT].decode("utf-8", "replace")
        _log.warning(
            "%s has no EOS token: answers end at %r, llama.cpp's default; convert it again",
            path,
            text,
        )
        return {}
    text = header.tokens[token].decode("utf-8", "replace")
    _log.warning("%s has no EOS token: answers end at %s", path, text)
    return {EOS_KEY: token}


def _names_one(header: Header) -> bool:
    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return True  # the defaults of other vocabularies are right
    token = header.metadata.get(EOS_KEY)
    if isinstance(token, int) and 0 <= token < len(header.tokens):
        return True
    return len(header.tokens) > _DEFAULT and header.tokens[_DEFAULT] in _ENDS
