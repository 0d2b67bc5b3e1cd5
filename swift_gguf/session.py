"""Prompt tokens in, a stream of text out: what answers people and programs one after another.

`generate` and `chat` share it.  The context keeps the text of the latest answer, so that of a
prompt that begins with it only the rest is decoded.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_gguf.engine import generate
from swift_gguf.errors import StoppedError
from swift_gguf.interrupts import heard
from swift_gguf.model import Model
from swift_gguf.outputs import replacing
from swift_gguf.sampling import Sampler, SamplingOptions, SpeculativeSampler
from swift_gguf.search.drivers import IdleSearch
from swift_gguf.speculation import Speculation
from swift_gguf.stats import Stats
from swift_gguf.text import StreamDecoder

ENOUGH = 8
"""Plain passes within an answer that tell what plain decoding would have taken."""


@dataclass(frozen=True)
class Piece:
    """A token of an answer."""

    text: str
    """What the token completes; empty where a character goes on in the next token."""
    token: int
    source: str
    """Who proposed it: a source of drafts, or ``target``."""


class Answer:
    """One answer, decoded while it is iterated; may be iterated once."""

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        options: SamplingOptions,
        *,
        max_tokens: int | None,
        decoder: StreamDecoder | None,
    ) -> None:
        self.prompt = list(prompt)
        self.options = options
        self.tokens: list[int] = []
        self.text = ""
        self.stats = Stats()
        self._known_ms: float | None = None
        self.interrupted = False
        self.decoder = decoder or StreamDecoder(session.model)
        self._session, self._max_tokens = session, max_tokens
        self._running = False
        self._lock = threading.RLock()  # a signal's handler may come while its thread holds it

    def __iter__(self) -> Generator[Piece, None, None]:
        """The pieces, in order.

        Raises: as `engine.generate`, and GrammarError.
        """
        with self._session.exclusive(), self._stoppable():
            try:
                yield from self._pieces()
            except StoppedError:
                if not self.interrupted:
                    raise
            finally:
                if self._session.speculation:
                    self._session.speculation.end()

    def _pieces(self) -> Iterator[Piece]:
        session, speculation = self._session, self._session.speculation
        is_drawn = speculation is not None and speculation.options.sampled
        kind = SpeculativeSampler if is_drawn else Sampler
        first_ms: float | None = None
        with kind(session.model, self.options, prompt=self.prompt) as sampler:
            drawing = sampler if isinstance(sampler, SpeculativeSampler) else None
            search = speculation.begin(len(self.prompt), sampler=drawing) if speculation else None
            stream = generate(
                session.model,
                self.prompt,
                sampler=sampler,
                drafter=speculation.drafter if speculation else None,
                search=search,
                draft_max=speculation.draft_max if speculation else 1,
                max_tokens=self._max_tokens,
                stats=self.stats,
            )
            for token in stream:
                now_ms = session.plain_ms()
                first_ms = now_ms if first_ms is None else first_ms
                if first_ms is not None and now_ms is not None:
                    self._known_ms = (first_ms + now_ms) / 2  # the context grew meanwhile
                self.tokens.append(token.id)
                text = self.decoder.feed(token.id)
                self.text += text
                yield Piece(text, token.id, token.source)
                if self.interrupted:
                    stream.close()
                    break

    def finish(self) -> str:
        """What is left of a torn character, when no answer goes on with it."""
        rest = self.decoder.finish()
        self.text += rest
        return rest

    def stop(self) -> None:
        """Ends the answer, within one operation of a pass; any thread may call it."""
        with self._lock:
            self.interrupted = True
            if self._running:
                self._session.model.stop.raise_()

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        with self._lock:
            self._session.model.stop.lower()  # a third Ctrl-C may have left it up
            self._running = True
            if self.interrupted:  # while the model was waited for
                self._session.model.stop.raise_()
        try:
            yield
        finally:
            with self._lock:
                self._running = False
                self._session.model.stop.lower()

    @property
    def plain_ms(self) -> float | None:
        """What a pass of plain decoding takes: by those of this answer, or where these are few by
        what passes took before on this machine; None: not known."""
        stats = self.stats
        if stats.plain_cycles >= ENOUGH:
            return 1e3 * stats.plain_s / stats.plain_cycles
        return self._known_ms

    @property
    def gain(self) -> float | None:
        """Times as fast as plain decoding, which takes `plain_ms` and the draw for every token."""
        stats = self.stats
        if self.plain_ms is None or not stats.cycle_s:
            return None
        return (stats.cycle_n * self.plain_ms / 1e3 + stats.sample_s) / stats.cycle_s


class Session:
    """A model, and what speculates for it.  Owns the speculation, not the model.

    Not safe for use by several threads at once, `Answer.stop` excepted.
    """

    def __init__(self, model: Model, speculation: Speculation | None = None) -> None:
        self.model = model
        self.speculation = speculation
        self.idle: IdleSearch | None = None
        self._on_step: Callable[[], None] | None = None

    def answer(
        self,
        prompt: Sequence[int],
        options: SamplingOptions,
        *,
        max_tokens: int | None = None,
        decoder: StreamDecoder | None = None,
    ) -> Answer:
        """What the model says to `prompt`; nothing is decoded before it is iterated.

        max_tokens: None: to the end, or until the context is full.
        decoder: of the answer that this one goes on with.
        """
        return Answer(self, prompt, options, max_tokens=max_tokens, decoder=decoder)

    def plain_ms(self) -> float | None:
        """What a token takes by plain decoding, at the present length of the context; None: not
        known yet."""
        learning = self.speculation.learning if self.speculation else None
        return learning.here.verify_ms(1) if learning and learning.here.is_known else None

    def search_when_idle(self, on_step: Callable[[], None] = lambda: None) -> None:
        """From now on, between answers, look for better drafts.

        on_step: called after every step, in the search's thread; the model is its own then.
        """
        self._on_step = on_step
        if self.speculation and self.idle is None:
            self.idle = self.speculation.idle_search(on_step=on_step)

    def exclusive(self, *, renews: bool = True) -> AbstractContextManager[Any]:
        """The model, without a search that goes on beside.

        renews: see `IdleSearch.paused`.
        """
        return self.idle.paused(renews=renews) if self.idle else nullcontext()

    def speculate(self, make: Callable[[], Speculation]) -> None:
        """Goes on with another speculation; if it cannot be made, with the present one.

        Raises: what `make` raises.
        """
        with self.exclusive():
            fresh = make()
        before, self.speculation = self.speculation, fresh
        self._end_idle()
        if before:
            before.retire()
        if self._on_step:
            self.search_when_idle(self._on_step)

    def save(self) -> None:
        """Keeps what was learned."""
        if self.speculation:
            with self.exclusive():
                self.speculation.save()

    def save_now_and_then(self) -> None:
        """Between answers: so much is never lost."""
        if self.speculation and self.speculation.is_save_due:
            self.save()

    def save_state(
        self,
        path: Path,
        *,
        n_tokens: int | None = None,
        notes: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> int:
        """Writes the context to a file, so that its text need not be processed again.

        Only the owner can read the file.  Returns its size in bytes.  See `Model.save_state`.
        """
        with self.exclusive(), replacing(path) as file:
            return self.model.save_state(file, n_tokens=n_tokens, notes=notes, limit=limit)

    def load_state(self, path: Path) -> Mapping[str, Any]:
        """Replaces the context by a saved one.  Returns the notes saved with it.

        An answer to a prompt that begins with its text processes only the rest of the prompt.

        Raises:
            StateError: the file is damaged, or of another model, library or kind of context.
            OSError: the file cannot be read.
        """
        with self.exclusive(), path.open("rb") as file:
            return self.model.load_state(file)

    def close(self) -> None:
        """Ends the search and frees a draft model; safe to call twice."""
        try:
            self._end_idle()
        finally:
            if self.speculation:
                self.speculation.close()

    def _end_idle(self) -> None:
        if self.idle:
            self.idle.end()
            self.idle = None  # only now: an interrupted end must not let others at the model

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def stopped_by_ctrl_c(answer: Answer) -> Iterator[None]:
    """Inside, Ctrl-C stops the answer, a long pass under way included; the third one interrupts,
    the second is that of a person in a hurry, who wants to keep what was said no less.

    For the main thread.
    """
    received = 0

    def handle(*_: object) -> None:
        nonlocal received
        received += 1
        if received > 2:
            raise KeyboardInterrupt
        answer.stop()

    handler = signal.signal(signal.SIGINT, handle)
    try:
        with heard(answer.stop):
            yield
    finally:
        signal.signal(signal.SIGINT, handler)
