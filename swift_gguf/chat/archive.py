"""Saves conversations to files and loads them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from swift_gguf.chat.conversation import Turn
from swift_gguf.chat.reader import read
from swift_gguf.errors import SwiftError
from swift_gguf.model import Model
from swift_gguf.outputs import replacing
from swift_gguf.text import StreamDecoder, encode
from swift_gguf.text_files import read_text

FORMAT, VERSION = "swift-gguf conversation", 1


def save(path: Path, model: Model, *, system: str | None, turns: Sequence[Turn]) -> None:
    """Writes a conversation to a file that only its owner can read.  A failure leaves no file.

    Raises:
        SwiftError: the file cannot be written, or another kind of file has this name.
    """
    if path.exists() and not _is_ours(path):
        raise SwiftError(f"{path} exists and is not a saved conversation; choose another name")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": model.metadata("general.name") or model.path.stem,
        "system": system,
        "turns": [
            {
                "user": turn.user,
                "assistant": turn.text,
                "tokens": list(turn.tokens),
                "sources": list(turn.sources),
                "seed": turn.seed,
                "stop_reason": turn.stop_reason,
            }
            for turn in turns
        ],
    }
    try:
        _write(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise SwiftError(f"{path} cannot be written: {error.strerror or error}") from error


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())


def _is_ours(path: Path) -> bool:
    with suppress(SwiftError):
        _content(path)
        return True
    return False


def load(path: Path, model: Model) -> tuple[str | None, list[Turn]]:
    """The system message and the turns of a saved conversation.

    An answer is tokenised again if this model's vocabulary gives its tokens another text.

    Raises:
        SwiftError: the file cannot be read, or it is not a conversation.
    """
    content = _content(path)
    try:
        system = _text(content["system"]) if content["system"] is not None else None
        return system, [_turn(model, values) for values in _list(content["turns"])]
    except (KeyError, TypeError, ValueError) as error:
        raise SwiftError(f"{path} is a damaged conversation: {_reason(error)}") from error


def n_turns(path: Path) -> int:
    """The number of turns of a saved conversation.

    Raises: as `load`.
    """
    try:
        return len(_list(_content(path)["turns"]))
    except (KeyError, ValueError) as error:
        raise SwiftError(f"{path} is a damaged conversation: {_reason(error)}") from error


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path, pipes=False))
    except (ValueError, RecursionError) as error:
        raise SwiftError(f"{path} is not a saved conversation: {_reason(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SwiftError(f"{path} is not a saved conversation; /save writes one")
    if content.get("version") != VERSION:
        raise SwiftError(f"{path} was saved by another version of swift-gguf; use that one")
    return content


def _turn(model: Model, values: Any) -> Turn:
    if not isinstance(values, dict):
        raise ValueError("a turn is not an object")
    text, tokens = _text(values["assistant"]), [_token(token) for token in _list(values["tokens"])]
    sources = [_text(source) for source in _list(values["sources"])]
    if not _spell(model, tokens, text):
        tokens = encode(model, text, special=False, start=False)
        sources = []
    if len(sources) not in (0, len(tokens)):
        raise ValueError("the numbers of tokens and sources differ")
    seed = values["seed"]
    return Turn(
        user=_text(values["user"]),
        tokens=tuple(tokens),
        text=text,
        sources=tuple(sources),
        thought_n=read(model, tokens)[1],
        seed=None if seed is None else _token(seed),
        stop_reason=_text(values["stop_reason"]),
    )


def _spell(model: Model, tokens: Sequence[int], text: str) -> bool:
    if any(token >= model.n_vocab for token in tokens):
        return False
    decoder = StreamDecoder(model)
    return "".join(map(decoder.feed, tokens)) + decoder.finish() == text


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is not a text")
    # a JSON escape may be half of a surrogate pair, which cannot be encoded
    return value.encode("utf-8", "replace").decode()


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r:.40} is not a list")
    return value


def _token(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 32:
        raise ValueError(f"{str(value)[:40]!r} is not a token id")
    return value


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    return str(error) or type(error).__name__
