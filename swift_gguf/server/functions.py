"""The old form of tool calls in OpenAI's API: one `function_call` in an answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Choice = dict[str, Any]


def first_in_message(choice: Choice) -> Choice:
    """A choice of a chat completion with its first call only."""
    message = choice["message"]
    if not message.get("tool_calls"):
        return choice
    return {**choice, "message": {**message, "tool_calls": message["tool_calls"][:1]}}


def first_in_stream(choices: Iterator[Choice]) -> Iterator[Choice]:
    """Choices of chunks with the parts of the first call only."""
    for choice in choices:
        calls = choice["delta"].get("tool_calls")
        if not calls:
            yield choice
        elif first := [call for call in calls if call["index"] == 0]:
            yield {**choice, "delta": {**choice["delta"], "tool_calls": first}}


def in_message(choice: Choice) -> Choice:
    """A choice with its one call as `function_call`."""
    return _renamed(choice, "message")


def in_stream(choices: Iterator[Choice]) -> Iterator[Choice]:
    """Choices of chunks with their one call as `function_call`."""
    return (_renamed(choice, "delta") for choice in choices)


def _renamed(choice: Choice, where: str) -> Choice:
    said = dict(choice[where])
    if calls := said.pop("tool_calls", None):
        said["function_call"] = calls[0]["function"]
    reason = choice["finish_reason"]
    return {
        **choice,
        where: said,
        "finish_reason": "function_call" if reason == "tool_calls" else reason,
    }
