"""Separates a reasoning model's thoughts from its answer while the text is generated."""

from __future__ import annotations

from dataclasses import dataclass

MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>final<|message|>"),
)
"""Marks around thoughts: Qwen, DeepSeek, SmolLM and most others (two forms); Magistral; gpt-oss."""

SILENT = ("<|channel|>final<|message|>", "<|end|>")
"""gpt-oss's marks around an answer without thoughts."""


@dataclass(frozen=True)
class Part:
    """Some text of an answer."""

    text: str
    is_thought: bool = False


class Thoughts:
    """Splits a stream of text.  An answer has thoughts at most once, at its beginning.

    is_open: the prompt has already begun the thoughts.
    """

    def __init__(self, *, is_open: bool = False) -> None:
        self._end: str | None = None
        self._rest = ""  # text that may be the beginning of a mark
        self._is_waiting = True  # no text so far: thoughts may still begin
        self._trims = False  # remove the blanks after a mark
        self.thought = False
        """True if there were thoughts."""
        if is_open:
            self._open(MARKS[0][1])

    @property
    def is_open(self) -> bool:
        """True inside thoughts."""
        return self._end is not None

    def _open(self, end: str) -> None:
        self._end, self._trims, self._is_waiting, self.thought = end, True, False, True

    def feed(self, text: str) -> list[Part]:
        """The parts that `text` completes; holds back text that may begin a mark."""
        self._rest += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def skip(self, text: str) -> str:
        """Reads text that precedes the stream; returns it without the thoughts."""
        parts = self.feed(text) + self.finish()
        return "".join(part.text for part in parts if not part.is_thought)

    def finish(self) -> list[Part]:
        """The text that was held back, after the end of the stream."""
        rest, self._rest = self._rest, ""
        return self._part(rest)

    def _advance(self, parts: list[Part]) -> bool:
        """Reads one mark or the text before it; False if more text is needed."""
        if self._end is not None:
            return self._think(self._end, parts)
        if self._is_waiting:
            return self._wait()
        rest, self._rest = self._rest, ""
        parts += self._part(rest)
        return False

    def _think(self, end: str, parts: list[Part]) -> bool:
        thought, mark, after = self._rest.partition(end)
        if mark:
            # gpt-oss ends the message with its thoughts before it begins the answer
            parts += self._part(thought.removesuffix("<|end|>").rstrip())
            self._end, self._rest, self._trims = None, after, True
            return True
        held = max(_overlap(self._rest, end), _overlap(self._rest, "<|end|>" + end))
        cut = len(self._rest) - held
        cut = len(self._rest[:cut].rstrip())  # hold back blanks: the mark may follow
        parts += self._part(self._rest[:cut])
        self._rest = self._rest[cut:]
        return False

    def _wait(self) -> bool:
        said = self._rest.lstrip()
        for begin, end in MARKS:
            if said.startswith(begin):
                self._rest = said[len(begin) :]
                self._open(end)
                return True
        for mark in SILENT:
            if said.startswith(mark):
                self._rest = said[len(mark) :]
                return True
        marks = [begin for begin, _ in MARKS] + list(SILENT)
        if any(mark.startswith(said) for mark in marks):
            return False
        self._is_waiting = False
        return True

    def _part(self, text: str) -> list[Part]:
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        return [Part(text, is_thought=self._end is not None)] if text else []


def _overlap(text: str, mark: str) -> int:
    """Number of characters at the end of `text` that may begin `mark`."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(mark[:n])), 0)
