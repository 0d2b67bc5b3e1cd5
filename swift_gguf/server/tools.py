"""Tool calls, read out of answers.

Most open models (Qwen, Hermes, SmolLM3, ...) wrap calls as
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``; an answer that must be one of several
calls is that JSON, held to it by a grammar.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from swift_gguf.server.requests import Tool

BEGIN, END = "<tool_call>", "</tool_call>"


def any_call(tools: Sequence[Tool]) -> dict[str, Any]:
    """The schema of a call of one of these."""
    return {
        "oneOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.name},
                    "arguments": tool.function.parameters,
                },
                "required": ["name", "arguments"],
            }
            for tool in tools
        ]
    }


class Calls:
    """Splits an answer, as it comes, into what is said and what is called.

    bare: the whole answer is the JSON of a call.
    """

    def __init__(self, *, bare: bool) -> None:
        self.found: list[dict[str, Any]] = []
        """OpenAI's `tool_calls`."""
        self._bare, self._inside, self._text = bare, bare, ""

    def feed(self, text: str) -> str:
        """What is said of what has come; what may be the beginning of a call is kept back."""
        self._text += text
        said = ""
        while not self._bare:
            mark = END if self._inside else BEGIN
            before, found, after = self._text.partition(mark)
            if not found:
                break
            said += self._call(before) if self._inside else before
            self._text, self._inside = after, not self._inside
        if self._inside:
            return said
        kept = _beginning(self._text, BEGIN)
        said += self._text[: len(self._text) - kept]
        self._text = self._text[len(self._text) - kept :]
        return said

    def finish(self) -> str:
        """What is said of what was kept back; some models leave out the end of a call."""
        rest, self._text = self._text, ""
        return self._call(rest) if self._inside else rest

    def _call(self, text: str) -> str:
        """Keeps a call; what is none was only said."""
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError):
            return text if self._bare else f"{BEGIN}{text}"
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        self.found.append(
            {
                "index": len(self.found),
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": str(name), "arguments": arguments},
            }
        )
        return ""


def _beginning(text: str, mark: str) -> int:
    """How much of the end of `text` may be the beginning of `mark`."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


def in_message(choice: dict[str, Any], *, bare: bool) -> dict[str, Any]:
    """A choice of a chat completion, with the calls in its text as `tool_calls`."""
    calls = Calls(bare=bare)
    message = choice["message"]
    said = calls.feed(message["content"] or "") + calls.finish()
    if not calls.found:
        return choice
    found = [{key: call[key] for key in ("id", "type", "function")} for call in calls.found]
    message = {**message, "content": said.strip() or None, "tool_calls": found}
    return {**choice, "message": message, "finish_reason": "tool_calls"}


def in_stream(choices: Iterator[dict[str, Any]], *, bare: bool) -> Iterator[dict[str, Any]]:
    """Choices of chunks, with the calls in their text as `tool_calls`, each in one chunk."""
    calls, n_sent = Calls(bare=bare), 0
    for choice in choices:
        said = calls.feed(choice["delta"].get("content") or "")
        if choice["finish_reason"]:
            said += calls.finish()
        plain = {**choice, "finish_reason": None}
        if said.strip() or (said and not calls.found):
            yield {**plain, "delta": {**choice["delta"], "content": said}}
        elif choice["delta"].keys() - {"content"}:
            yield {**plain, "delta": choice["delta"]}
        for call in calls.found[n_sent:]:
            yield {**plain, "logprobs": None, "delta": {"tool_calls": [call]}}
        n_sent = len(calls.found)
        if choice["finish_reason"]:
            reason = "tool_calls" if calls.found else choice["finish_reason"]
            yield {**choice, "delta": {}, "finish_reason": reason}
