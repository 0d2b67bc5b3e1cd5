"""A conversation as tokens.

A prompt is the chat template's text, with earlier answers as the tokens that were generated.
Tokenising their text again might give other tokens, and the rest of the context would have to be
decoded again.  So only new text is tokenised and decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swift_gguf.model import Model
from swift_gguf.templates import Prompting, with_reasoning
from swift_gguf.text import Message, encode, render_chat
from swift_gguf.text.thinking import MARKS


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A message and the answer to it."""

    user: str
    tokens: tuple[int, ...]
    """The answer's tokens."""
    text: str
    """The answer's text, thoughts included."""
    sources: tuple[str, ...] = ()
    """The source of each token; empty if unknown."""
    thought_n: int = 0
    """Number of tokens that are thoughts."""
    seed: int | None = None
    stop_reason: str = ""
    """See `Stats.stop_reason`."""


class Conversation:
    """The turns of a conversation; makes the prompt for the next answer.

    template: a Jinja template that replaces the model's own.
    variables: more variables for the template: ``enable_thinking``, ...
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.system = system
        self.thinks: bool | None = None
        """Whether the model thinks first; None: the variables or the template decide."""
        self._variables = variables or {}
        self.turns: list[Turn] = []
        self.first = 0
        """Index of the first turn in the context; earlier turns were dropped."""
        self._model, self._template = model, template
        self._drops_thoughts: bool | None = None

    def prompt(self, user: str, *, said: Sequence[int] = ()) -> list[int]:
        """The prompt for the answer to the message `user`.

        said: tokens of the answer generated so far.

        Raises:
            ModelError: there is no chat template, or it refuses the messages.
        """
        turns = self.turns[self.first :]
        places = [f"\ue000{number}\ue001" for number in range(len(turns))]
        text = self._render([*self._pairs(turns, places), _message("user", user)])
        if any(text.count(place) != 1 for place in places):  # the template rewrites answers
            answers = [turn.text for turn in turns]
            text = self._render([*self._pairs(turns, answers), _message("user", user)])
            return [*encode(self._model, text), *said]
        tokens: list[int] = []
        for turn, place in zip(turns, places, strict=True):
            before, _, text = text.partition(place)
            tokens += encode(self._model, before, start=not tokens)
            is_cut = turn.thought_n > 0 and self.drops_thoughts
            tokens += turn.tokens[turn.thought_n if is_cut else 0 :]
        return [*tokens, *encode(self._model, text, start=not tokens), *said]

    def opens_thoughts(self, user: str) -> bool:
        """True if the template ends the prompt with the mark that begins thoughts."""
        text = self._render([_message("user", user)]).rstrip()
        return any(text.endswith(begin) for begin, _ in MARKS)

    @property
    def drops_thoughts(self) -> bool:
        """True if the template omits the thoughts of earlier answers.

        Models with such a template were trained that way.
        """
        if self._drops_thoughts is None:
            begin, end = MARKS[0]
            answer = f"{begin}\n\ue000\n{end}\n\nyes"
            messages = [_message("user", "?"), _message("assistant", answer)]
            self._drops_thoughts = "\ue000" not in self._render([*messages, _message("user", "?")])
        return self._drops_thoughts

    def _pairs(self, turns: Sequence[Turn], answers: Sequence[str]) -> list[Message]:
        return [
            message
            for turn, answer in zip(turns, answers, strict=True)
            for message in (_message("user", turn.user), _message("assistant", answer))
        ]

    def _render(self, messages: list[Message]) -> str:
        system = [_message("system", self.system)] if self.system else []
        return render_chat(
            self._model,
            [*system, *messages],
            template=self._template,
            prompting=Prompting(variables=with_reasoning(self._variables, thinks=self.thinks)),
        )

    # -- changes -----------------------------------------------------------------------------------

    def undo(self) -> Turn | None:
        """Removes and returns the last turn.

        If no turn is left in the context, the dropped turns return to it.
        """
        if not self.turns:
            return None
        turn = self.turns.pop()
        if self.first >= len(self.turns):
            self.first = 0
        return turn

    def clear(self) -> None:
        """Deletes all turns; keeps the system message."""
        self.turns.clear()
        self.first = 0

    def drop_oldest(self) -> bool:
        """Drops the oldest turn from the context; False if there is none."""
        if self.first == len(self.turns):
            return False
        self.first += 1
        return True


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
