"""Which token ends an answer, where the file does not say so.

llama.cpp then takes the token 11 of a BPE vocabulary, GPT-4's: in most others that is a comma, and
each answer ends at its first one.
"""

from __future__ import annotations

import logging
from pathlib import Path

from swift_gguf.gguf.header import Header

EOS_KEY = "tokenizer.ggml.eos_token_id"

_DEFAULT = 11
# Ends of a turn by name, those of whole texts last.
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
    """The token that ends answers instead of llama.cpp's default; None: that is right, or nothing
    better is known."""
    if _names_one(header):
        return None
    template = header.metadata.get("tokenizer.chat_template")
    text = template.encode("utf-8", "replace") if isinstance(template, str) else b""
    known = [end for end in _ENDS if end in header.tokens]
    named = [end for end in known if end in text]
    ends = named or known
    return header.tokens.index(ends[0]) if ends else None


def overrides(header: Header, path: Path | str) -> dict[str, int]:
    """What llama.cpp is told instead of the file, with a line of warning."""
    if _names_one(header) or len(header.tokens) <= _DEFAULT:
        return {}
    if (token := end_token(header)) is None:
        text = header.tokens[_DEFAULT].decode("utf-8", "replace")
        _log.warning(
            "%s names no end token: answers end at %r, llama.cpp's default; convert it again",
            path,
            text,
        )
        return {}
    text = header.tokens[token].decode("utf-8", "replace")
    _log.warning("%s names no end token: answers end at %s", path, text)
    return {EOS_KEY: token}


def _names_one(header: Header) -> bool:
    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return True  # others have a default that fits them
    token = header.metadata.get(EOS_KEY)
    if isinstance(token, int) and 0 <= token < len(header.tokens):
        return True
    return len(header.tokens) > _DEFAULT and header.tokens[_DEFAULT] in _ENDS
