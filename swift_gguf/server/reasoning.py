"""What a model thinks before it answers: llama-server's `reasoning_content`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from swift_gguf.chat.thinking import Part, Thoughts


def in_message(choice: dict[str, Any], *, before: str = "") -> dict[str, Any]:
    """A choice of a chat completion, its thoughts apart.

    before: what of the answer the prompt itself has.
    """
    thoughts = _thoughts(before)
    parts = thoughts.feed(choice["message"]["content"] or "") + thoughts.finish()
    if not thoughts.thought:
        return choice
    thought, said = (
        "".join(part.text for part in parts if part.is_thought is kind) for kind in (True, False)
    )
    return {
        **choice,
        "message": {**choice["message"], "content": said, "reasoning_content": thought},
    }


def in_stream(
    choices: Iterator[dict[str, Any]], *, before: Callable[[], str]
) -> Iterator[dict[str, Any]]:
    """Choices of chunks, their thoughts apart.

    before: as for `in_message`; asked when the first chunk is there.
    """
    thoughts = None
    for choice in choices:
        thoughts = thoughts or _thoughts(before())
        delta = {key: value for key, value in choice["delta"].items() if key != "content"}
        parts = thoughts.feed(choice["delta"].get("content") or "")
        if choice["finish_reason"]:
            for part in parts + thoughts.finish():
                yield {**choice, "delta": _delta(part), "logprobs": None, "finish_reason": None}
            yield {**choice, "delta": delta}
            continue
        if not parts and (delta or choice["logprobs"]):
            yield {**choice, "delta": delta}
        for part in parts:
            yield {**choice, "delta": {**delta, **_delta(part)}}
            choice = {**choice, "logprobs": None}  # a token's, once
            delta = {}


def _thoughts(before: str) -> Thoughts:
    thoughts = Thoughts()
    thoughts.skip(before)
    return thoughts


def _delta(part: Part) -> dict[str, str]:
    return {"reasoning_content" if part.is_thought else "content": part.text}
