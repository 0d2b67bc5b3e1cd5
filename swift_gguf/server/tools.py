"""Finds tool calls in the text of an answer.

llama.cpp's parser for the chat template has read the answer before (`by_template`).  Models also
use forms that are not their template's, and those are found here: calls between the marks of other
model families, and answers that consist of calls only.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from swift_gguf.server.call_forms import Form, bare_calls, calls_in, cut_call, may_be_bare
from swift_gguf.server.requests import Tool

BEGIN, END = "<tool_call>", "</tool_call>"
MARKS = {BEGIN: END, "<tools>": "</tools>", "[TOOL_CALLS]": "", "<|python_tag|>": ""}
"""The marks at the beginning and the end of a call.  Without an end mark, the call is the rest of
the answer."""
FUNCTION, FUNCTION_END = "<function=", "</function>"
"""Qwen3-Coder's inner marks, which it sometimes writes without the outer ones."""
_OPENINGS = ("{", "[{", "```", FUNCTION)
"""The text between the marks begins with one of these."""
MAX_OPENING = 80
"""Characters after a mark that decide whether a call begins."""
PIECE = 256
"""Characters that are parsed at once."""


class Calls:
    """Splits the answer into text and calls while it is generated.

    tools: the tools of the request.  Between ``<tool_call>`` marks a call may name another tool,
        and the client reports the error.  Elsewhere such text is not a call.
    bare: the whole answer is the JSON of a call, in the form of `schemas.call_of`.
    """

    def __init__(self, tools: Sequence[Tool], *, bare: bool = False) -> None:
        self.found: list[dict[str, Any]] = []
        """OpenAI's `tool_calls`."""
        self._tools = {tool.name: tool.function.parameters for tool in tools}
        self._bare = bare
        self._text = ""  # text that is kept back
        self._mark = ""  # the mark of the call that has begun
        self._is_first = True  # no text yet: the whole answer may be a call
        self._holds = False  # the answer begins like a call

    def feed(self, text: str) -> str:
        """Adds text of the answer and returns the part that is text.  The part that may be a call
        is kept back."""
        # in pieces, because every mark is searched for in all text that is kept back
        pieces = range(0, len(text), PIECE)
        return "".join(self._feed(text[at : at + PIECE]) for at in pieces)

    def _feed(self, text: str) -> str:
        self._text += text
        if self._bare or (self._is_first and self._may_be_whole()):
            return ""
        said = ""
        while (more := self._step()) is not None:
            said += more
        return said

    def finish(self, *, is_cut: bool = False) -> str:
        """Ends the answer and returns the rest of its text.

        is_cut: generation was stopped, so an unfinished call counts as a call.
        """
        rest, self._text = self._text, ""
        if self._bare:
            self._add(calls_in(rest, self._tools) or _listed(cut_call(rest)))
            return ""  # a bare call has no text around it
        if self._is_first and self._holds:
            self._is_first = False
            if found := bare_calls(rest, self._tools):
                self._add(found)
                return ""
            return self.feed(rest) + self.finish(is_cut=is_cut)
        if not self._mark:
            return rest
        inside = rest[len(self._mark) :]
        calls = self._between(inside)
        if not calls and is_cut and self._mark == BEGIN:
            calls = _listed(cut_call(inside))
        self._mark = ""
        self._add(calls or [])
        return "" if calls else rest

    def _may_be_whole(self) -> bool:
        if not self._holds:
            known = may_be_bare(self._text, list(self._tools))
            self._holds = known is True
            self._is_first = known is not False
        return self._is_first

    def _step(self) -> str | None:
        """The text up to the next mark or after it; None if more text is needed."""
        if self._mark:
            return self._inside()
        at, mark = min(
            ((self._text.find(mark), mark) for mark in (*MARKS, FUNCTION) if mark in self._text),
            default=(-1, ""),
        )
        if mark:
            said, self._text = self._text[:at], self._text[at:]
            self._mark = mark
            return said
        kept = max(_beginning(self._text, mark) for mark in (*MARKS, FUNCTION))
        cut = len(self._text) - kept
        said, self._text = self._text[:cut], self._text[cut:]
        return said or None

    def _inside(self) -> str | None:
        """Parses the text after a mark: "" for a call, the text itself if it is not a call, None
        if more text is needed."""
        mark = self._mark
        end = FUNCTION_END if mark == FUNCTION else MARKS[mark]
        inside = self._text[len(mark) :]
        # text that only mentions a mark is not kept back
        if not self._may_be_inside(inside):
            self._mark, self._text = "", inside
            return mark
        if not end or (at := inside.find(end)) < 0:
            return None
        calls = self._between(inside[:at])
        self._mark, self._text = "", inside[at + len(end) :]
        self._add(calls or [])
        return "" if calls else mark + inside[:at] + end

    def _may_be_inside(self, inside: str) -> bool:
        if self._mark == FUNCTION:
            name, end, _ = inside.partition(">")
            return name in self._tools if end else any(one.startswith(name) for one in self._tools)
        begun = inside[:MAX_OPENING].lstrip()
        if self._mark == "[TOOL_CALLS]" and begun[:1].isalpha():
            return any(name.startswith(begun) or begun.startswith(name) for name in self._tools)
        begun = begun.replace(" ", "").replace("\n", "")
        return any(one.startswith(begun) or begun.startswith(one) for one in _OPENINGS)

    def _between(self, inside: str) -> list[Form] | None:
        """The calls between two marks."""
        if self._mark == FUNCTION:
            inside = FUNCTION + inside
        calls = calls_in(inside, self._tools)
        if calls and self._mark != BEGIN and any(call.name not in self._tools for call in calls):
            return None
        return calls

    def _add(self, calls: Sequence[Form]) -> None:
        for call in calls:
            self.found.append(openai_call(len(self.found), call.name, call.arguments))


def openai_call(index: int, name: str, arguments: str, id: str = "") -> dict[str, Any]:
    """A call in the form of OpenAI's streams."""
    return {
        "index": index,
        "id": id or f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _listed(call: Form | None) -> list[Form]:
    return [] if call is None else [call]


def _beginning(text: str, mark: str) -> int:
    """The number of characters at the end of `text` that may be the beginning of `mark`."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
