"""Splits an answer into `reasoning_content`, `content` and `tool_calls`.

Three parsers read the answer, one after the other: llama.cpp's parser for the chat template
(`by_template`), the one for marks around the reasoning (`Thoughts`), and the one for calls in any
form (`tools`).  If the answer does not follow the template's syntax, only the last two read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from swift_gguf.server.by_template import ByTemplate, is_object
from swift_gguf.server.requests import Tool
from swift_gguf.server.syntax import Syntax
from swift_gguf.server.tools import Calls, openai_call
from swift_gguf.text.thinking import Thoughts

Choice = dict[str, Any]

OPEN = "<think>"
"""Opens the reasoning in an answer.  A template may use another mark in the prompt."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What an answer may consist of.

    tools: the tools that may be called.  Without tools the answer is not searched for calls.
    must_call: the answer is the JSON of a call, and nothing else.
    splits: the reasoning is split from the content.
    before: the beginning of the answer that is already in the prompt.
    syntax: the template's syntax of answers.
    """

    tools: Sequence[Tool] = ()
    must_call: bool = False
    splits: bool = True
    before: str = ""
    syntax: Syntax | None = None


class Answer:
    """Parses an answer while it is generated.  Its reasoning, text and calls only grow."""

    def __init__(self, expected: Expected) -> None:
        self.thought = self.said = ""
        self.calls: list[dict[str, Any]] = []
        """OpenAI's `tool_calls`, each as soon as it is finished."""
        self._expected = expected
        self._text = ""
        self._calls = Calls(expected.tools, bare=expected.must_call) if expected.tools else None
        self._template = ByTemplate(expected.syntax) if expected.syntax else None
        self._thoughts: Thoughts | None = None
        before = expected.before
        if expected.splits and not (expected.syntax and expected.syntax.thinking):
            self._thoughts = Thoughts()
            before = self._thoughts.skip(before)
        # the prompt may end inside a call; if it turns out to be text, do not send that part again
        self._n_before = len(before) - len(self._calls.feed(before)) if self._calls else 0
        self._n_said = 0  # characters taken from the template's parser
        self._n_loose = self._n_by_template = 0  # calls that each parser has found
        self._is_over = False

    def feed(self, text: str) -> None:
        """Adds the next text of the answer."""
        self._text += text
        if self._thoughts:
            self._sort(self._thoughts.feed(text))
        else:
            self._read(text)

    def finish(self, *, is_cut: bool) -> None:
        """Ends the answer.

        is_cut: generation was stopped, so the last call may be unfinished.
        """
        self._is_over = True
        if self._thoughts:
            self._sort(self._thoughts.finish())
        if self._template:
            if not self._template.finish(is_cut=is_cut):
                self._read_plainly(is_cut=is_cut)
                return
            self._look()
        if self._calls:
            self._told(self._calls.finish(is_cut=is_cut))

    @property
    def is_whole(self) -> bool:
        """True if the last call is finished."""
        return not self.calls or is_object(self.calls[-1]["function"]["arguments"])

    @property
    def shown(self) -> str:
        """The text to send.  Whitespace before a call is not part of it."""
        is_open = bool(self._calls) and not self._is_over
        return self.said.rstrip() if is_open or self.calls else self.said

    def _sort(self, parts: Sequence[Any]) -> None:
        for part in parts:
            if part.is_thought:
                self.thought += part.text
            else:
                self._read(part.text)

    def _read(self, text: str) -> None:
        if self._template:
            self._template.feed(text)
            self._look()
        else:
            self._say(text)

    def _look(self) -> None:
        """Takes what the template's parser has found."""
        assert self._template
        if self._template.thought:
            self.thought = self._template.thought.strip()
        said = self._template.said
        before, new = said[: self._n_said], said[self._n_said :]
        self._n_said = len(said)
        if self.thought and not self._thoughts and not before.strip():
            new = new.lstrip()
        self._say(new)
        self._add()

    def _say(self, text: str) -> None:
        self._told(self._calls.feed(text) if self._calls else text)

    def _told(self, said: str) -> None:
        if self._calls and self._calls.found:
            self._n_before = 0
        cut = min(self._n_before, len(said))
        self._n_before -= cut
        self.said += said[cut:]
        self._add()

    def _add(self) -> None:
        """Adds the calls that were found since the last time."""
        if self._calls is None:
            return
        for call in self._calls.found[self._n_loose :]:
            self.calls.append({**call, "index": len(self.calls)})
        self._n_loose = len(self._calls.found)
        given = self._template.calls if self._template else []
        for one in given[self._n_by_template :]:
            arguments = one["arguments"] or "{}"
            self.calls.append(openai_call(len(self.calls), one["name"], arguments, one["id"]))
        self._n_by_template = len(given)

    def _read_plainly(self, *, is_cut: bool) -> None:
        """Parses the whole answer again without the template.  What was sent stays as it is."""
        plain = Answer(replace(self._expected, syntax=None))
        plain.feed(self._text)
        plain.finish(is_cut=is_cut)
        self.thought = _going_on(self.thought, plain.thought)
        # the template's parser drops leading whitespace
        self.said = _going_on(self.shown, plain.said.lstrip())
        self.calls += plain.calls[len(self.calls) :]


def _going_on(told: str, text: str) -> str:
    """`told`, continued by what follows it in `text`, if `text` contains it."""
    at = text.find(told.strip())
    return (
        told
        if at < 0
        else told + text[at + len(told.strip()) :].removeprefix(told[len(told.rstrip()) :])
    )


def in_message(choice: Choice, expected: Expected) -> Choice:
    """Parses a choice of a chat completion whose content is the whole answer."""
    answer = Answer(expected)
    answer.feed(choice["message"]["content"] or "")
    answer.finish(is_cut=choice["finish_reason"] == "length")
    message = {**choice["message"], "content": answer.shown}
    if answer.thought:
        message["reasoning_content"] = answer.thought
    if answer.calls:
        message["content"] = answer.shown or None
        message["tool_calls"] = [
            {key: call[key] for key in ("id", "type", "function")} for call in answer.calls
        ]
    return {**choice, "message": message, "finish_reason": _reason(choice, answer)}


def in_stream(choices: Iterator[Choice], expected: Callable[[], Expected]) -> Iterator[Choice]:
    """Parses choices of chunks.  Each call comes in one chunk.

    expected: called when the first chunk arrives.
    """
    answer: Answer | None = None
    told = {"reasoning_content": 0, "content": 0, "tool_calls": 0}
    for choice in choices:
        answer = answer or Answer(expected())
        delta = {key: value for key, value in choice["delta"].items() if key != "content"}
        answer.feed(choice["delta"].get("content") or "")
        if choice["finish_reason"]:
            answer.finish(is_cut=choice["finish_reason"] == "length")
        logprobs = choice["logprobs"]  # sent only once for each token
        plain = {**choice, "finish_reason": None}
        for new in _told_now(answer, told):
            yield {**plain, "delta": {**delta, **new}, "logprobs": logprobs}
            delta, logprobs = {}, None
        if choice["finish_reason"]:
            reason = _reason(choice, answer)
            yield {**choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        elif delta or logprobs:
            yield {**plain, "delta": delta, "logprobs": logprobs}


def _told_now(answer: Answer, told: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yields the deltas of what is new, and counts it as sent in `told`."""
    texts = (("reasoning_content", answer.thought), ("content", answer.shown))
    for name, text in texts:
        if new := text[told[name] :]:
            told[name] = len(text)
            yield {name: new}
    for call in answer.calls[told["tool_calls"] :]:
        told["tool_calls"] += 1
        yield {"tool_calls": [call]}


def _reason(choice: Choice, answer: Answer) -> Any:
    """The finish reason.  A call that was cut off does not count."""
    return "tool_calls" if answer.calls and answer.is_whole else choice["finish_reason"]
