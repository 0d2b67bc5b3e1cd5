"""Parses an answer while it is generated, with llama.cpp's parser for the chat template."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from swift_gguf.server.syntax import Syntax
from swift_gguf.server.tools import MARKS

_MARKING = frozenset("<>[]{}`|")
"""A mark begins with one of these characters, or with the first character of a template's mark."""
_GROWTH = 512
"""The text is parsed again when it has grown by 1/512, so that all parses together read at most
512 times the answer."""
_GROWTH_OF_CALLS = 16
"""Inside a call it is 1/16, because nothing of a call is sent before its end."""


class ByTemplate:
    """The reasoning, the text and the tool calls of an answer.  All three only grow."""

    def __init__(self, syntax: Syntax) -> None:
        self.thought = self.said = ""
        self.calls: list[dict[str, str]] = []
        """Finished calls."""
        self._syntax = syntax
        self._text = ""
        self._n_read = 0
        self._grows: str | None = None  # which of the two texts new tokens belong to
        self._is_calling = False
        firsts = {mark[:1] for mark in (*syntax.shown, syntax.thinking) if mark}
        self._marking = _MARKING | firsts

    def feed(self, text: str) -> None:
        """Adds the next text of the answer."""
        self._text += text
        if self._grows and not text[-1:].isspace() and self._marking.isdisjoint(text):
            setattr(self, self._grows, getattr(self, self._grows) + text)
            self._n_read = len(self._text)
            return
        new = self._text[self._n_read :]
        if len(new) * (_GROWTH_OF_CALLS if self._is_calling else _GROWTH) < len(self._text):
            self._grows = None  # the text that is not parsed yet may be a mark
            return
        self._n_read = len(self._text)
        before = {"said": self.said, "thought": self.thought}
        self._grows = None
        with suppress(ValueError):
            self._take(self._read(is_partial=True), is_over=False)
        for name, earlier in before.items():
            if new and not self._is_calling and getattr(self, name) == earlier + new:
                self._grows = name  # all new text belongs to it, so no mark has begun

    def finish(self, *, is_cut: bool) -> bool:
        """Ends the answer.  True if the whole answer follows the syntax.

        is_cut: generation was stopped, so the last call may be unfinished.
        """
        try:
            said = self._read(is_partial=False)
        except ValueError:
            return False
        if not is_cut and not all(is_object(call["arguments"]) for call in said["tool_calls"]):
            return False
        return self._take(said, is_over=True)

    def _read(self, *, is_partial: bool) -> dict[str, Any]:
        read = self._syntax.reader.read(self._text, is_partial=is_partial)
        if not is_partial and not read["tool_calls"]:
            read["content"] = self._to_its_end(read["content"])
        return read

    def _to_its_end(self, said: str) -> str:
        """`said` with the end of the answer, which the parser may take for the beginning of a mark
        or for whitespace before one."""
        if said.strip() == self._text.strip():
            return self._text
        at = self._text.rfind(said) + len(said) if said else 0
        rest = self._text[at:]
        is_half = any(mark.startswith(rest) and mark != rest for mark in self._syntax.shown)
        is_no_call = any(rest.lstrip().startswith(mark) for mark in MARKS)
        return said + rest if is_half or is_no_call else said

    def _take(self, read: dict[str, Any], *, is_over: bool) -> bool:
        """Takes the result of a parse if it continues the result of the last one."""
        thought, said, calls = read["reasoning_content"], read["content"], read["tool_calls"]
        whole = calls if is_over else calls[:-1]
        fits = bool(
            thought.startswith(self.thought.rstrip())
            and said.startswith(self.said.rstrip())
            and whole[: len(self.calls)] == self.calls[: len(whole)]
        )
        if fits:
            self._is_calling = bool(calls)
            self.thought = max(thought, self.thought, key=len)
            self.said = max(said, self.said, key=len)
            self.calls += whole[len(self.calls) :]
        return fits


def is_object(text: str) -> bool:
    """True if the text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
