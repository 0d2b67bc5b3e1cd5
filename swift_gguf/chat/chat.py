"""A chat: messages go to the model, answers to the screen; knows nothing of terminals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from swift_gguf.chat import archive
from swift_gguf.chat.conversation import Conversation, Turn
from swift_gguf.chat.figures import Figures, Totals, details, runs, shares
from swift_gguf.chat.reader import Reader
from swift_gguf.chat.screen import Screen, View
from swift_gguf.chat.settings import Settings
from swift_gguf.errors import ContextFullError, SwiftError
from swift_gguf.sampling import SamplingOptions
from swift_gguf.session import Answer, Piece, Session, stopped_by_ctrl_c
from swift_gguf.speculation import Speculation, SpeculationOptions
from swift_gguf.templates import THINKS
from swift_gguf.text import encode, read_prompt

BETTER = 1.02
"""By which drafts must be expected to be faster before a person is told."""


@dataclass
class _Said:
    """An answer in the making; it may take several, where turns leave a full context."""

    options: SamplingOptions
    reader: Reader
    pieces: list[Piece] = field(default_factory=list)
    rest: str = ""
    answer: Answer | None = None
    """The latest."""

    @property
    def tokens(self) -> list[int]:
        return [piece.token for piece in self.pieces]

    @property
    def sources(self) -> list[str]:
        return [piece.source for piece in self.pieces]

    @property
    def stop_reason(self) -> str:
        """See `Stats.stop_reason`; empty before it begins."""
        return self.answer.stats.stop_reason if self.answer else ""

    @property
    def is_something(self) -> bool:
        """A word, or that the model had none."""
        return bool(self.pieces) or self.stop_reason not in ("", "stopped")

    def finish(self) -> str:
        """What is left of a torn character; safe to call twice."""
        rest = self.answer.finish() if self.answer else ""
        self.rest += rest
        return rest

    def turn(self, user: str) -> Turn:
        """What stays of it."""
        return Turn(
            user=user,
            tokens=tuple(self.tokens),
            text="".join(piece.text for piece in self.pieces) + self.rest,
            sources=tuple(self.sources),
            thought_n=self.reader.thought_n,
            seed=self.options.seed,
            stop_reason=self.stop_reason,
        )


class Chat:
    """A conversation with a model."""

    def __init__(
        self,
        session: Session,
        conversation: Conversation,
        screen: Screen,
        settings: Settings | None = None,
    ) -> None:
        self.session, self.conversation, self.screen = session, conversation, screen
        self.settings = settings or Settings()
        self.figures = Figures(n_ctx=session.model.n_ctx)
        self.totals = Totals()
        self.interrupted = False
        """Did Ctrl-C end the latest answer?"""
        self._attached: list[str] = []
        self._attempt = 0
        self._latest: Answer | None = None
        self._expected: float | None = None  # of the drafts at the latest answer
        self._found = ""

    # -- talking -----------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """A message, with what was attached; the answer goes to the screen and the conversation.

        Raises:
            ContextFullError: there is no room; nothing has been said then.
            ModelError: the chat template refuses the messages.
        """
        self._attempt = 0
        n_turns = len(self.conversation.turns)
        try:
            self._answer("".join([*self._attached, text]))
        finally:
            if len(self.conversation.turns) > n_turns:  # else they are still to be said
                self._attached.clear()

    def regenerate(self) -> None:
        """Another answer to the latest message.

        Raises:
            SwiftError: there is none yet.
        """
        first, turn = self.conversation.first, self.conversation.undo()
        if turn is None:
            raise SwiftError("there is no answer yet; say something first")
        if self.settings.sampling.temperature <= 0:
            self.screen.note("at temperature 0 the answer stays the same; /set temp 0.8")
        self._attempt += 1
        n_turns = len(self.conversation.turns)
        try:
            self._answer(turn.user)
        finally:
            if len(self.conversation.turns) == n_turns:  # no other has come: the old one stays
                self.conversation.turns.append(turn)
                self.conversation.first = first

    def _answer(self, user: str) -> None:
        self.conversation.thinks = THINKS[self.settings.reasoning]
        prompt = self._fitting(user)
        opens_thoughts = self.conversation.opens_thoughts(user)
        said = _Said(self._options(), Reader(self.session.model, is_open=opens_thoughts))
        try:
            with self.screen.answer(self.settings) as view:
                answer = self._stream(prompt, said, view)
                while self._goes_on(answer):
                    prompt = self.conversation.prompt(user, said=said.tokens)
                    answer = self._stream(prompt, said, view)
                rest = said.finish()
                view.feed(rest, said.reader.finish(rest))
        finally:  # it may be cut short by an error, too, or by a person's third Ctrl-C
            said.finish()
            if said.is_something:
                self.conversation.turns.append(said.turn(user))
        self._close(answer, said)
        self._say_how_it_ended(answer, said)

    def _options(self) -> SamplingOptions:
        """A given seed holds for every answer, so that each can be repeated; tries differ."""
        options = self.settings.sampling
        if options.seed is not None:
            options = replace(options, seed=options.seed + self._attempt)
        return options.with_seed()

    def _stream(self, prompt: Sequence[int], said: _Said, view: View) -> Answer:
        limit = self.settings.max_tokens
        said.answer = answer = self.session.answer(
            prompt,
            said.options,
            max_tokens=None if limit is None else limit - len(said.pieces),
            decoder=said.answer.decoder if said.answer else None,
        )
        with stopped_by_ctrl_c(answer), closing(iter(answer)) as pieces:
            for piece in pieces:
                said.pieces.append(piece)
                view.feed(piece.text, said.reader.feed(piece))
        return answer

    def _close(self, answer: Answer, said: _Said) -> None:
        self.interrupted = answer.interrupted
        self._latest = answer
        self.totals.count(answer)
        with self.session.exclusive():
            self.figures = Figures.of(self.session, answer, said.sources)
            self._expected, self._found = self._expectation(), ""
        self.session.save_now_and_then()

    def _say_how_it_ended(self, answer: Answer, said: _Said) -> None:
        reason = answer.stats.stop_reason
        if not said.is_something:
            self.screen.note("stopped before the first word; the message is taken back")
        elif answer.interrupted:
            self.screen.note("stopped; what was said stays")
        elif reason == "context":
            n_ctx = self.session.model.n_ctx
            self.screen.note(
                f"the context of {n_ctx} tokens is full, the answer ends here; "
                "/clear, or start with a larger -c"
            )
        elif reason == "length":
            self.screen.note(f"ended after {self.settings.n_predict} tokens; see /set n-predict")
        elif not said.pieces:
            self.screen.note("the model has nothing to say")

    # -- room --------------------------------------------------------------------------------------

    def _fitting(self, user: str) -> list[int]:
        """The prompt, after as many of the oldest turns have left the context as must."""
        conversation, n_ctx = self.conversation, self.session.model.n_ctx
        prompt = conversation.prompt(user)
        if self.settings.context == "stop":
            if len(prompt) >= n_ctx:
                raise ContextFullError(
                    f"the context is full: with this message the conversation has {len(prompt)} "
                    f"tokens of {n_ctx}; /undo, /clear, or /set context shift"
                )
            return prompt
        if len(prompt) + n_ctx // 16 <= n_ctx:
            return prompt
        first = conversation.first
        # more than must be, or every further message would be decoded with all that is before it
        while len(prompt) + n_ctx // 4 > n_ctx and conversation.drop_oldest():
            prompt = conversation.prompt(user)
        if len(prompt) >= n_ctx:
            conversation.first = first
            raise ContextFullError(
                f"the message is too long: {len(prompt)} tokens, and the context has {n_ctx}; "
                "shorten it, or start with a larger -c"
            )
        self._say_dropped(conversation.first - first)
        return prompt

    def _goes_on(self, answer: Answer) -> bool:
        """Was the context full, and has it room again?"""
        if answer.stats.stop_reason != "context" or self.settings.context == "stop":
            return False
        conversation, n_ctx = self.conversation, self.session.model.n_ctx
        first, tokens = conversation.first, 0
        while tokens < n_ctx // 4 and conversation.drop_oldest():
            turn = conversation.turns[conversation.first - 1]
            tokens += len(turn.tokens) + len(encode(self.session.model, turn.user, start=False))
        self._say_dropped(conversation.first - first)
        return conversation.first > first

    def _say_dropped(self, n: int) -> None:
        if n:
            turns = "turn has" if n == 1 else f"{n} turns have"
            self.screen.note(f"the context is full: the oldest {turns} left it")

    # -- what commands do --------------------------------------------------------------------------

    def detach(self) -> int:
        """Files that were to go with the next message do not; how many there were."""
        n = len(self._attached)
        self._attached.clear()
        return n

    def clear(self) -> None:
        """Forgets what was said; the system message stays."""
        self.conversation.clear()
        self._attached.clear()

    def attach(self, path: Path) -> None:
        """A text file goes with the next message.

        Raises:
            SwiftError: it is no regular file, cannot be read, or is larger than the context.
        """
        try:
            text = read_prompt(path.expanduser(), pipes=False)
        except RuntimeError as error:  # no such user's home
            raise SwiftError(f"{path} cannot be read: {error}") from error
        n_tokens, n_ctx = len(encode(self.session.model, text, start=False)), self.figures.n_ctx
        if n_tokens >= n_ctx:
            raise SwiftError(
                f"{path} has {n_tokens} tokens and the context {n_ctx}; start with a larger -c, "
                "or give a part of it"
            )
        fence = "```"
        while fence in text:
            fence += "`"
        end = "" if text.endswith("\n") or not text else "\n"
        self._attached.append(f"{path.name}:\n{fence}\n{text}{end}{fence}\n\n")
        self.screen.note(f"{path.name} ({n_tokens} tokens) goes with your next message")

    def save(self, path: Path) -> None:
        """See `archive.save`."""
        conversation = self.conversation
        path = path.expanduser()
        archive.save(path, self.session.model, system=conversation.system, turns=conversation.turns)
        self.screen.note(f"saved {_counted(len(conversation.turns), 'turn')} to {path}")

    def load(self, path: Path) -> None:
        """Goes on with a saved conversation instead of this one; see `archive.load`."""
        path = path.expanduser()
        system, turns = archive.load(path, self.session.model)
        self.clear()
        self.conversation.system, self.conversation.turns = system, turns
        self.screen.note(f"loaded {_counted(len(turns), 'turn')} from {path}")

    def speculate(self, mode: str, make: Callable[[SpeculationOptions], Speculation]) -> None:
        """Drafts by other sources from now on.

        Raises: as `make`; the present ones stay then.
        """
        present = self.session.speculation
        options = present.options if present else SpeculationOptions()
        self.session.speculate(lambda: make(replace(options, mode=mode)))
        self._expected, self._found = None, ""

    def stats(self) -> list[str]:
        """The latest answer's figures in lines."""
        if self._latest is None:
            raise SwiftError("there are no figures yet; say something first")
        return details(self._latest, self.figures, self.totals, idle=self._idle())

    def show(self) -> tuple[list[tuple[str, str]], str]:
        """The latest answer by source, and a legend."""
        turn = self.conversation.turns[-1] if self.conversation.turns else None
        if turn is None or not turn.sources:
            raise SwiftError("there is no answer of which sources are known; say something first")
        mix = ", ".join(f"{source} {share:.0%}" for source, share in shares(turn.sources))
        return runs(self.session.model, turn.tokens, turn.sources), f"proposed by: {mix}"

    # -- the idle search ---------------------------------------------------------------------------

    def on_idle_step(self) -> None:
        """Called in the search's thread."""
        expected = self._expectation()
        if expected is not None and expected > max(1.0, (self._expected or 1.0)) * BETTER:
            before = f", before {self._expected:.2f}x" if self._expected else ""
            self._found = f"better drafts, {expected:.2f}x plain expected{before}"

    def _expectation(self) -> float | None:
        """Of drafts by skipping layers, against plain decoding; None: too little is known."""
        speculation = self.session.speculation
        learning = speculation.learning if speculation else None
        known = learning.best_known if learning and learning.searcher else None
        return known.rate.speedup if known else None

    def current_figures(self) -> Figures:
        """With what the idle search has found since the latest answer."""
        return self.figures.with_found(self._found)

    def _idle(self) -> str:
        idle = self.session.idle
        if idle is None:
            return "nothing to search"
        found = f"; {self._found}" if self._found else ""
        return f"{_counted(idle.meter.steps, 'step')} in {idle.meter.seconds:.1f} s{found}"


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
