"""What was said so far, as tokens: the model's own stay as they were generated.

A prompt is the chat template's text with the tokens of earlier answers in place of their text.
Their text, tokenised anew, might be other tokens, and the context would have to be decoded again
from there on; so only what is new is tokenised and decoded.
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
    """Of the answer."""
    text: str
    """The answer as it was spelt, thoughts included."""
    sources: tuple[str, ...] = ()
    """Who proposed each of the tokens; empty where that is not known."""
    thought_n: int = 0
    """How many of the tokens are thoughts."""
    seed: int | None = None
    stop_reason: str = ""
    """See `Stats.stop_reason`."""


class Conversation:
    """Turns, and the prompts that continue them.

    template: a Jinja template instead of the model's own.
    variables: what it is told beside the messages: ``enable_thinking``, ...
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
        """Does the model think first?  None: as the variables, or the template, have it."""
        self._variables = variables or {}
        self.turns: list[Turn] = []
        self.first = 0
        """Turns before this one have left the context."""
        self._model, self._template = model, template
        self._drops_thoughts: bool | None = None

    def prompt(self, user: str, *, said: Sequence[int] = ()) -> list[int]:
        """The tokens that the model continues with its answer to `user`.

        said: what of the answer is there already.

        Raises:
            ModelError: there is no chat template, or it refuses the messages.
        """
        turns = self.turns[self.first :]
        places = [f"\ue000{number}\ue001" for number in range(len(turns))]
        text = self._render([*self._pairs(turns, places), _message("user", user)])
        if any(text.count(place) != 1 for place in places):  # a template that rewrites answers
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
        """Does the prompt end in the middle of thoughts, by the template's doing?"""
        text = self._render([_message("user", user)]).rstrip()
        return any(text.endswith(begin) for begin, _ in MARKS)

    @property
    def drops_thoughts(self) -> bool:
        """Does the template leave the thoughts of earlier answers out?

        Models whose templates do were trained so.
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

    # -- changing it -------------------------------------------------------------------------------

    def undo(self) -> Turn | None:
        """Takes the last turn back; where none is left in the context, older ones return to it."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        if self.first >= len(self.turns):
            self.first = 0
        return turn

    def clear(self) -> None:
        """Forgets everything but the system message."""
        self.turns.clear()
        self.first = 0

    def drop_oldest(self) -> bool:
        """One turn leaves the context, to make room; False if there is none."""
        if self.first == len(self.turns):
            return False
        self.first += 1
        return True


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
