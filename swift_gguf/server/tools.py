"""Tool calls, read out of what an answer says.

llama.cpp's reader for the model's template has read it before (`by_template`).  What it does not
find is looked for here in the forms that models have learned elsewhere: between the marks of other
families, and as the whole of an answer.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from swift_gguf.server.call_forms import Form, bare_calls, calls_in, cut_call, may_be_bare
from swift_gguf.server.requests import Tool

BEGIN, END = "<tool_call>", "</tool_call>"
MARKS = {BEGIN: END, "<tools>": "</tools>", "[TOOL_CALLS]": "", "<|python_tag|>": ""}
"""Where a call begins and ends; without an end it is all that follows."""
FUNCTION, FUNCTION_END = "<function=", "</function>"
"""Qwen3-Coder's inner marks, which it gives without the outer ones, too."""
_OPENINGS = ("{", "[{", "```", FUNCTION)
"""What stands between the marks begins like this."""
MAX_OPENING = 80
"""Characters that are looked at to tell."""
PIECE = 256
"""Characters that are read at once."""


class Calls:
    """Splits what is said, as it comes, into text and calls.

    tools: those that are offered.  Between ``<tool_call>`` marks a call may have another name (the
        client says that there is no such tool); elsewhere that is no call.
    bare: all of it is the JSON of a call, as `schemas.call_of` has it.
    """

    def __init__(self, tools: Sequence[Tool], *, bare: bool = False) -> None:
        self.found: list[dict[str, Any]] = []
        """OpenAI's `tool_calls`."""
        self._tools = {tool.name: tool.function.parameters for tool in tools}
        self._bare = bare
        self._text = ""  # what is kept back
        self._mark = ""  # that has begun
        self._is_first = True  # nothing is said yet: the whole may be a call
        self._holds = False  # it begins like one

    def feed(self, text: str) -> str:
        """What is said of what has come; what may be a call is kept back."""
        # a whole answer, too, comes in pieces: every mark is looked for in all that is kept
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
        """What is said of what was kept back.

        is_cut: the answer was ended from outside: a call that has begun is one as far as it goes.
        """
        rest, self._text = self._text, ""
        if self._bare:
            self._add(calls_in(rest, self._tools) or _listed(cut_call(rest)))
            return ""  # what is around a call is no text
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
        """What is said up to the next mark or after it; None when more text is needed."""
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
        """After a mark: a call, what turns out to be none, or None."""
        mark = self._mark
        end = FUNCTION_END if mark == FUNCTION else MARKS[mark]
        inside = self._text[len(mark) :]
        # a mark that only is spoken of keeps nothing back
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
        """The calls between marks."""
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
    """A call as OpenAI's streams have it."""
    return {
        "index": index,
        "id": id or f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _listed(call: Form | None) -> list[Form]:
    return [] if call is None else [call]


def _beginning(text: str, mark: str) -> int:
    """How much of the end of `text` may be the beginning of `mark`."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
