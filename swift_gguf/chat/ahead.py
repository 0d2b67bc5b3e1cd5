"""Reads the next prompt while the person types it.

Only what is certain is read.  A wrong guess costs time and changes no text: an answer keeps of the
context only what its prompt begins with.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from swift_gguf.engine import reuse
from swift_gguf.errors import StoppedError, SwiftError
from swift_gguf.session import Session

PAUSE_S = 0.15
"""Seconds without a key before typed text is read."""
BATCH = 128
"""Tokens in a batch at most.  Enter waits for the batch under way; smaller ones are slower."""
LONGEST_WORD = 24
"""Characters that are kept back at most where a text has no blanks, as in Chinese."""

_WORD = re.compile(r"\S*\Z")
_log = logging.getLogger("swift_gguf")


def finished(text: str) -> str:
    """`text` without its last word, which may go on, and without the blanks before it."""
    word = _WORD.search(text, max(0, len(text) - LONGEST_WORD))
    return text[: word.start() if word else 0].rstrip()


class ReadAhead:
    """A thread that decodes the beginning of the next prompt.

    It uses the model only inside `typing`, and nobody else does there, except the idle search,
    which it pauses.

    begun: tokens that the next prompt begins with, for a line that may go on; called in the thread.
    """

    def __init__(self, session: Session, begun: Callable[[str], list[int]]) -> None:
        self._session, self._begun = session, begun
        self._state = threading.Condition()
        self._line: str | None = None  # None: not inside `typing`
        self._due: float | None = None  # the time to read the line; None: it is read
        self._reads: str | None = None  # what the pass under way relies on: the line begins with it
        self._latest: str | None = None  # what was read last
        self._works = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="swift-gguf-ahead", daemon=True)
        self._thread.start()

    @contextmanager
    def typing(self) -> Iterator[None]:
        """Inside, the person types the line, and the thread has the model."""
        with self._state:
            self._line, self._latest = "", None
            self._due = monotonic()
            self._state.notify_all()
        try:
            yield
        except BaseException:  # Ctrl-C or Ctrl-D: nothing is sent
            self._give_back(stops=True)
            raise
        self._give_back()

    @property
    def is_in_pass(self) -> bool:
        """Whether a forward pass is under way."""
        return self._reads is not None

    def changed(self, line: str) -> None:
        """Tells what is typed so far.  A pass that reads deleted text is stopped."""
        with self._state:
            if self._line is None:
                return
            self._line = line
            self._due = monotonic() + PAUSE_S
            if self._reads is not None and not line.startswith(self._reads):
                self._session.model.stop.raise_()
            self._state.notify_all()

    def close(self) -> None:
        """Ends the thread.  May be called twice."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        self._give_back(stops=True)
        self._thread.join()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _give_back(self, *, stops: bool = False) -> None:
        """Waits until the thread has left the model.

        stops: do not wait for the end of the pass under way.
        """
        with self._state:
            self._line = self._due = None
            try:
                if stops:
                    self._stop_pass()
                self._wait()
            except BaseException:  # Ctrl-C: the model must be free all the same
                self._stop_pass()
                self._wait()
                raise

    def _stop_pass(self) -> None:
        if self.is_in_pass:
            self._session.model.stop.raise_()

    def _wait(self) -> None:
        while self._works:
            self._state.wait()

    # -- in the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while (line := self._next()) is not None:
            try:
                with self._session.exclusive(renews=False):
                    self._read(line)
            except SwiftError:  # stopped, or something that sending the line will tell
                pass
            except Exception as error:
                _log.warning("nothing is read ahead any more: %s", error)
                self._closed = True
            finally:
                with self._state:
                    self._works = False
                    self._state.notify_all()

    def _next(self) -> str | None:
        """Waits for a line that is due.  None: the thread should end."""
        with self._state:
            while not self._closed:
                wait_s = None if self._due is None else self._due - monotonic()
                if wait_s is not None and wait_s <= 0:
                    self._due, self._works = None, True
                    return self._line
                self._state.wait(wait_s)
            return None

    def _read(self, line: str) -> None:
        if self._latest is None:  # what comes before the message
            self._decode(self._begun(""), relies_on="")
            self._latest = ""
        known = line if line.startswith("/") else finished(line)
        if known != self._latest and not self._session.model.rollback_refusal:
            self._decode(self._begun(line), relies_on=known)
            self._latest = known

    def _decode(self, tokens: Sequence[int], *, relies_on: str) -> None:
        model = self._session.model
        while model.tokens[: len(tokens)] != tokens:
            with self._passing(relies_on):
                start = reuse(model, tokens)
                model.decode(tokens[start : start + BATCH], n_outputs=0)

    @contextmanager
    def _passing(self, relies_on: str) -> Iterator[None]:
        """Around a pass that `changed` may stop.

        Raises:
            StoppedError: the line no longer begins with `relies_on`.
        """
        stop = self._session.model.stop
        with self._state:
            if self._line is None or not self._line.startswith(relies_on):
                raise StoppedError
            self._reads = relies_on
        try:
            yield
        finally:
            with self._state:
                self._reads = None
                stop.lower()
