"""A chat: sends messages to the model and shows its answers on a `Screen`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from swift_gguf.chat import archive, kept
from swift_gguf.chat.ahead import finished
from swift_gguf.chat.conversation import Conversation, Turn
from swift_gguf.chat.figures import Figures, details, runs, shares
from swift_gguf.chat.kept import States
from swift_gguf.chat.reader import Reader
from swift_gguf.chat.screen import Screen, View
from swift_gguf.chat.settings import Settings
from swift_gguf.errors import ContextFullError, SwiftError
from swift_gguf.sampling import SamplingOptions
from swift_gguf.session import Answer, Piece, Session, stopped_by_ctrl_c
from swift_gguf.speculation import Speculation, SpeculationOptions
from swift_gguf.stats import Stats
from swift_gguf.templates import THINKS
from swift_gguf.text import encode, read_prompt
from swift_gguf.tokens import common_prefix

BETTER = 1.02
"""The chat reports better drafts if their predicted speed-up grows by this factor."""


@dataclass
class _Reply:
    """The reply to a message while it is generated.

    It consists of several `Answer`s if the context fills up and the oldest turns are dropped.
    """

    options: SamplingOptions
    reader: Reader
    pieces: list[Piece] = field(default_factory=list)
    rest: str = ""
    answers: list[Answer] = field(default_factory=list)

    @property
    def answer(self) -> Answer | None:
        """The latest of them."""
        return self.answers[-1] if self.answers else None

    @property
    def tokens(self) -> list[int]:
        return [piece.token for piece in self.pieces]

    @property
    def sources(self) -> list[str]:
        return [piece.source for piece in self.pieces]

    @property
    def stop_reason(self) -> str:
        """See `Stats.stop_reason`; empty before the reply begins."""
        return self.answer.stats.stop_reason if self.answer else ""

    @property
    def is_kept(self) -> bool:
        """True if the reply has a token, or if the model chose to say nothing."""
        return bool(self.pieces) or self.stop_reason not in ("", "stopped")

    def finish(self) -> str:
        """The text of an incomplete last character.  May be called twice."""
        rest = self.answer.finish() if self.answer else ""
        self.rest += rest
        return rest

    def turn(self, user: str) -> Turn:
        """The turn that the conversation keeps."""
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
        states: States | None = None,
    ) -> None:
        """
        states: None: no state of the context is kept with a saved conversation.
        """
        self.states = states
        self.session, self.conversation, self.screen = session, conversation, screen
        self.settings = settings or Settings()
        self.figures = Figures(n_ctx=session.model.n_ctx)
        self.n_answers, self.total = 0, Stats()
        self.interrupted = False
        """True if Ctrl-C ended the latest answer."""
        self._attached: list[str] = []
        self._attempt = 0
        self._latest: Answer | None = None
        self._expected: float | None = None  # predicted speed-up at the latest answer
        self._found = ""

    # -- messages and answers ----------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Sends a message with the attached files, and shows and keeps the answer.

        Raises:
            ContextFullError: the message does not fit the context; the conversation is unchanged.
            ModelError: the chat template refuses the messages.
        """
        self._attempt = 0
        n_turns = len(self.conversation.turns)
        try:
            self._answer("".join([*self._attached, text]))
        finally:
            if len(self.conversation.turns) > n_turns:  # else the files stay attached
                self._attached.clear()

    def regenerate(self) -> None:
        """Replaces the answer to the latest message by a new one.

        Raises:
            SwiftError: there is no answer yet.
        """
        first, turn = self.conversation.first, self.conversation.undo()
        if turn is None:
            raise SwiftError("there is no answer yet; send a message first")
        if self.settings.sampling.temperature <= 0:
            self.screen.note("at temperature 0 the answer stays the same; /set temp 0.8")
        self._attempt += 1
        n_turns = len(self.conversation.turns)
        try:
            self._answer(turn.user)
        finally:
            if len(self.conversation.turns) == n_turns:  # no new answer: keep the old one
                self.conversation.turns.append(turn)
                self.conversation.first = first

    def begun(self, text: str, *files: Path) -> list[int]:
        """Tokens that the next prompt begins with if its message begins with `text`.

        The text's last word may go on, and so may a token at the end of the word before.  Empty if
        the prompt does not fit the context as it is.

        files: are attached before the text.

        Raises:
            SwiftError: a file cannot be attached, or the template refuses the message.
        """
        message = "".join([*self._attached, *(self._attachment(file)[1] for file in files), text])
        self.conversation.thinks = THINKS[self.settings.reasoning]
        prompt = self.conversation.prompt(f"{message}x")  # as if the person typed on
        if not self._fits(prompt):
            return []
        return prompt[: common_prefix(self.conversation.prompt(finished(message)), prompt)]

    def _answer(self, user: str) -> None:
        self.conversation.thinks = THINKS[self.settings.reasoning]
        prompt = self._fitting(user)
        opens_thoughts = self.conversation.opens_thoughts(user)
        said = _Reply(self._options(), Reader(self.session.model, is_open=opens_thoughts))
        try:
            with self.screen.answer(self.settings) as view:
                answer = self._stream(prompt, said, view)
                while self._goes_on(answer):
                    prompt = self.conversation.prompt(user, said=said.tokens)
                    answer = self._stream(prompt, said, view)
                rest = said.finish()
                view.feed(rest, said.reader.finish(rest))
        finally:  # also after an error or a third Ctrl-C
            said.finish()
            if said.is_kept:
                self.conversation.turns.append(said.turn(user))
        self._close(answer, said)
        self._say_how_it_ended(answer, said)

    def _options(self) -> SamplingOptions:
        """The sampling options of an answer.

        A given seed is the same for every message, so that each answer can be repeated.
        `regenerate` adds one to it for every attempt.
        """
        options = self.settings.sampling
        if options.seed is not None:
            options = replace(options, seed=options.seed + self._attempt)
        return options.with_seed()

    def _stream(self, prompt: Sequence[int], said: _Reply, view: View) -> Answer:
        limit = self.settings.max_tokens
        answer = self.session.answer(
            prompt,
            said.options,
            max_tokens=None if limit is None else limit - len(said.pieces),
            decoder=said.answer.decoder if said.answer else None,
        )
        said.answers.append(answer)
        with stopped_by_ctrl_c(answer), closing(iter(answer)) as pieces:
            for piece in pieces:
                said.pieces.append(piece)
                view.feed(piece.text, said.reader.feed(piece))
        return answer

    def _close(self, answer: Answer, said: _Reply) -> None:
        self.interrupted = answer.interrupted
        self._latest = answer
        self.n_answers += 1
        self.total.add(answer.stats)
        with self.session.exclusive():
            self.figures = Figures.of(self.session, said.answers, said.sources)
            self._expected, self._found = self._expectation(), ""
        self.session.save_now_and_then()

    def _say_how_it_ended(self, answer: Answer, said: _Reply) -> None:
        reason = answer.stats.stop_reason
        if not said.is_kept:
            self.screen.note("stopped before the first word; the message is removed")
        elif answer.interrupted:
            self.screen.note("stopped; the text so far is kept")
        elif reason == "context":
            n_ctx = self.session.model.n_ctx
            self.screen.note(
                f"the context of {n_ctx} tokens is full and the answer ends here; "
                "/clear, or start with a larger -c"
            )
        elif reason == "length":
            self.screen.note(f"stopped after {self.settings.n_predict} tokens; see /set n-predict")
        elif not said.pieces:
            self.screen.note("the model ended its answer at once")

    # -- context size ------------------------------------------------------------------------------

    def _fitting(self, user: str) -> list[int]:
        """The prompt, after dropping as many of the oldest turns as necessary."""
        conversation, n_ctx = self.conversation, self.session.model.n_ctx
        prompt = conversation.prompt(user)
        if self._fits(prompt):
            return prompt
        if self.settings.context == "stop":
            raise ContextFullError(
                f"the context is full: with this message the conversation has {len(prompt)} "
                f"tokens of {n_ctx}; /undo, /clear, or /set context shift"
            )
        first = conversation.first
        # drop more than necessary: every drop means that the rest is decoded again
        while len(prompt) + n_ctx // 4 > n_ctx and conversation.drop_oldest():
            prompt = conversation.prompt(user)
        if len(prompt) >= n_ctx:
            conversation.first = first
            raise ContextFullError(
                f"the message is too long: {len(prompt)} tokens, but the context has {n_ctx}; "
                "shorten it, or start with a larger -c"
            )
        self._say_dropped(conversation.first - first)
        return prompt

    def _fits(self, prompt: Sequence[int]) -> bool:
        """Whether no turn has to be dropped for this prompt."""
        n_ctx = self.session.model.n_ctx
        n_answer = 1 if self.settings.context == "stop" else n_ctx // 16
        return len(prompt) + n_answer <= n_ctx

    def _goes_on(self, answer: Answer) -> bool:
        """If the context was full, drops the oldest turns; True if that made room to go on."""
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
            turns = "turn is" if n == 1 else f"{n} turns are"
            self.screen.note(f"the context is full: the oldest {turns} dropped")

    # -- commands ----------------------------------------------------------------------------------

    def detach(self) -> int:
        """Removes the attached files; returns how many there were."""
        n = len(self._attached)
        self._attached.clear()
        return n

    def clear(self) -> None:
        """Deletes all turns and attached files; keeps the system message."""
        self.conversation.clear()
        self._attached.clear()

    def attach(self, path: Path) -> None:
        """Attaches a text file to the next message.

        Raises:
            SwiftError: it is not a regular file, cannot be read, or is larger than the context.
        """
        n_tokens, text = self._attachment(path)
        self._attached.append(text)
        self.screen.note(f"{path.name} ({n_tokens} tokens) goes with your next message")

    def _attachment(self, path: Path) -> tuple[int, str]:
        """The tokens of a file, and its text as the message has it.

        Raises: as `attach`.
        """
        try:
            text = read_prompt(path.expanduser(), pipes=False)
        except RuntimeError as error:  # ~user, and there is no such user
            raise SwiftError(f"{path} cannot be read: {error}") from error
        n_tokens, n_ctx = len(encode(self.session.model, text, start=False)), self.figures.n_ctx
        if n_tokens >= n_ctx:
            raise SwiftError(
                f"{path} has {n_tokens} tokens, but the context has {n_ctx}; start with a larger "
                "-c, or give a part of it"
            )
        fence = "```"
        while fence in text:
            fence += "`"
        end = "" if text.endswith("\n") or not text else "\n"
        return n_tokens, f"{path.name}:\n{fence}\n{text}{end}{fence}\n\n"

    def save(self, path: Path) -> None:
        """Saves the conversation; see `archive.save`."""
        conversation = self.conversation
        archive.save(path, self.session.model, system=conversation.system, turns=conversation.turns)
        n_turns, state = _counted(len(conversation.turns), "turn"), self._keep_state(path)
        self.screen.note(f"saved {n_turns} to {path}{state}")

    def load(self, path: Path) -> None:
        """Replaces the conversation by a saved one; see `archive.load`."""
        system, turns = archive.load(path, self.session.model)
        self.clear()
        self.conversation.system, self.conversation.turns = system, turns
        notes = self.states.load(path, self.session) if self.states else None
        if notes:
            self.conversation.first = min(notes["first"], max(0, len(turns) - 1))
        state = " and the state of the context" if notes else ""
        self.screen.note(f"loaded {_counted(len(turns), 'turn')} from {path}{state}")

    def keep_last(self) -> None:
        """Saves the conversation as the last one, which `--resume` goes on with.

        Without states nothing is saved.
        """
        if self.states is None or not self.conversation.turns:
            return
        with suppress(OSError):  # the terminal may be gone
            try:
                self.save(kept.writable(kept.LAST))
            except SwiftError as error:
                self.screen.note(f"the conversation is not kept: {error}")

    def _keep_state(self, path: Path) -> str:
        """Saves the state of the context for a saved conversation.  Returns what to say of it."""
        if self.states is None:
            return ""
        try:
            notes = {"first": self.conversation.first}
            if (n_tokens := self._n_history()) >= kept.MIN_TOKENS:
                size = self.states.save(path, self.session, n_tokens=n_tokens, notes=notes)
                return f", and the state of the context ({size / 1e6:.1f} MB)"
            why = ""
        except (OSError, SwiftError) as error:
            why = f"; the state of the context is not kept: {error}"
        self.states.forget(path)
        return why

    def _n_history(self) -> int:
        """The number of tokens in the context that the next prompt begins with."""
        model = self.session.model
        common = common_prefix(model.tokens, self.conversation.prompt("x"))
        return 0 if model.rollback_refusal and common < model.n_past else common

    def saved(self) -> list[str]:
        """The conversations in the user's folder, in lines.

        Raises:
            SwiftError: there are none.
        """
        lines = []
        for name in kept.names():
            path = kept.place(name)
            try:
                what = _counted(archive.n_turns(path), "turn")
            except SwiftError:
                what = "damaged"
            size = self.states.size(path) if self.states else 0
            state = f"state {size / 1e6:.1f} MB" if size else ""
            day = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
            lines.append(f"{name:<20} {what:<10} {day}  {state}".rstrip())
        if not lines:
            raise SwiftError("no conversation is saved; /save NAME saves this one")
        return lines

    def speculate(self, mode: str, make: Callable[[SpeculationOptions], Speculation]) -> None:
        """Changes the sources of drafts.

        Raises: what `make` raises; the present sources then stay.
        """
        present = self.session.speculation
        options = present.options if present else SpeculationOptions()
        self.session.speculate(lambda: make(replace(options, mode=mode)))
        self._expected, self._found = None, ""

    def stats(self) -> list[str]:
        """The latest answer's statistics, in lines."""
        if self._latest is None:
            raise SwiftError("there are no statistics yet; send a message first")
        return details(
            self._latest,
            self.figures,
            n_answers=self.n_answers,
            total=self.total,
            idle=self._idle(),
        )

    def show(self) -> tuple[list[tuple[str, str]], str]:
        """The latest answer as (source, text) runs, and a legend."""
        turn = self.conversation.turns[-1] if self.conversation.turns else None
        if turn is None or not turn.sources:
            raise SwiftError("there is no answer with known sources; send a message first")
        mix = ", ".join(f"{source} {share:.0%}" for source, share in shares(turn.sources))
        return runs(self.session.model, turn.tokens, turn.sources), f"proposed by: {mix}"

    # -- the idle search ---------------------------------------------------------------------------

    def on_idle_step(self) -> None:
        """Called in the thread of the idle search after each step."""
        expected = self._expectation()
        if expected is not None and expected > max(1.0, (self._expected or 1.0)) * BETTER:
            before = f", before {self._expected:.2f}x" if self._expected else ""
            self._found = f"better drafts, predicted speed-up {expected:.2f}x{before}"

    def _expectation(self) -> float | None:
        """Predicted speed-up of layer-skip drafts; None if too little is known."""
        speculation = self.session.speculation
        learning = speculation.learning if speculation else None
        known = learning.best_known if learning and learning.searcher else None
        return known.rate.speedup if known else None

    def current_figures(self) -> Figures:
        """The figures, with what the idle search has found since the latest answer."""
        return replace(self.figures, found=self._found)

    def _idle(self) -> str:
        idle = self.session.idle
        if idle is None:
            return "off"
        found = f"; {self._found}" if self._found else ""
        return f"{_counted(idle.meter.steps, 'step')} in {idle.meter.seconds:.1f} s{found}"


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
