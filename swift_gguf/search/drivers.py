"""Who calls a search's steps, and when: while generating, while nobody asks, or on purpose.

The steps are the same; drivers differ in the windows they offer and the time they may take.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from swift_gguf.errors import SpoiledError, StoppedError, SwiftError
from swift_gguf.model import Model
from swift_gguf.search.optimizer import Searcher
from swift_gguf.search.window import TextWindow

_log = logging.getLogger("swift_gguf")


@dataclass
class Meter:
    """What a search has cost so far."""

    seconds: float = 0.0
    steps: int = 0


class OnTheFly:
    """Steps between the cycles of a generation, within a share of its time.

    A step is only begun when the budget covers what the dearest of the latest steps took, so the
    share holds at any moment but for a step that takes longer than those; it is made up for before
    the next.  What was not used is left for later generations.

    window: makes the window of a step, None while the text is too short.
    cost_s: what a step is expected to take, until there was one.
    on_step: called after every step.
    share: of the generation's time; None: SWIFT's way, a step after every `interval`-th cycle.
    """

    def __init__(
        self,
        searcher: Searcher,
        window: Callable[[], TextWindow | None],
        *,
        cost_s: Callable[[], float],
        share: float | None = 0.05,
        interval: int = 1,
        on_step: Callable[[], None] = lambda: None,
        meter: Meter | None = None,
    ) -> None:
        self.searcher = searcher
        self.meter = meter or Meter()
        self._window, self._expected_s = window, cost_s
        self._latest_s: deque[float] = deque(maxlen=8)
        self._share, self._interval = share, interval
        self._on_step = on_step
        self._earned = 0.0
        self._cycles = 0
        self._failed = False

    def step(self, cycle_s: float) -> None:
        """See `engine.Search`."""
        self._cycles += 1
        if self.searcher.done or self._failed:
            return
        if self._share is None:
            if self._cycles % self._interval:
                return
        else:
            self._earned += self._share * cycle_s
            if self._earned < (max(self._latest_s) if self._latest_s else self._expected_s()):
                return
        start = perf_counter()
        try:
            self._score()
        except StoppedError:  # whoever stopped it wants the text stopped, not the search
            raise
        except SpoiledError:  # and the text with it
            self._failed = True
            raise
        except SwiftError as error:  # the text is what matters
            _log.warning("the search stops: %s", error)
            self._failed = True
        finally:
            seconds = perf_counter() - start
            self._earned -= seconds
            self.meter.seconds += seconds

    def _score(self) -> None:
        window = self._window()
        if window is None:
            return
        start = perf_counter()
        self.searcher.step(window)
        self._latest_s.append(perf_counter() - start)
        self.meter.steps += 1
        self._on_step()


class IdleSearch:
    """Steps on the live context while nobody uses the model, in a thread of its own.

    Whoever uses the model does so inside `paused`.  A pass under way is stopped by the model's
    flag, within one operation, and leaves nothing behind: the text cannot be changed.

    window: makes the window of the present text, None if there is none.
    on_step: called after every step, in the thread, while the model is still its own.
    before: called there before a step, for what is more urgent than the search; True: it took the
        step's turn.
    limit_s: rest after so much time on one text: a laptop's battery is worth more than the last
        per cent.
    """

    def __init__(
        self,
        model: Model,
        searcher: Searcher,
        window: Callable[[], TextWindow | None],
        *,
        on_step: Callable[[], None] = lambda: None,
        before: Callable[[], bool] = lambda: False,
        limit_s: float = 60.0,
        meter: Meter | None = None,
    ) -> None:
        self.meter = meter or Meter()
        self._model, self._searcher, self._window = model, searcher, window
        self._on_step, self._before, self._limit_s = on_step, before, limit_s
        self._state = threading.Condition()
        self._users = 0
        self._working = False
        self._closed = False
        self._left_s = limit_s
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="swift-gguf-idle", daemon=True)
        self._thread.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The model is the caller's inside; the search goes on afterwards, on the text then there.

        May be nested, by one thread or several; who of them uses the model is theirs to agree on.
        """
        entered = False
        try:
            with self._state:
                self._users, entered = self._users + 1, True
                self._wait_for_worker()
            yield
        finally:
            with self._state:
                self._users -= entered
                self._left_s = self._limit_s
                self._state.notify_all()

    def close(self) -> None:
        """Ends the thread; the model may be used freely afterwards.  Safe to call twice."""
        with self._state:
            self._closed = True
            self._wait_for_worker()
            self._state.notify_all()
        self._thread.join()
        if self._error:
            error, self._error = self._error, None
            raise error

    def end(self) -> None:
        """As `close`, where the text matters alone: what broke the search is logged."""
        try:
            self.close()
        except SwiftError as error:
            _log.warning("the search in idle time ended: %s", error)

    def __enter__(self) -> IdleSearch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_for_worker(self) -> None:
        while self._working:
            self._model.stop.raise_()
            try:
                self._state.wait()
            finally:  # an interrupt must not leave it up
                self._model.stop.lower()

    def _run(self) -> None:
        while self._begin():
            start = perf_counter()
            try:
                worked = self._step()
            except StoppedError:
                worked = True
            except BaseException as error:  # told to whoever closes; the text goes on without
                self._error, worked = error, False
                self._closed = True
            self._end(perf_counter() - start if worked else self._limit_s)

    def _begin(self) -> bool:
        """Waits for its turn; False at the end."""
        with self._state:
            while not self._closed and (self._users or self._left_s <= 0):
                self._state.wait()
            self._working = not self._closed
            return self._working

    def _step(self) -> bool:
        """One step; False if there is nothing to do on this text."""
        if self._before():
            return True
        window = None if self._searcher.done else self._window()
        if window is None:
            return False
        start = perf_counter()
        try:
            self._searcher.step(window)
        finally:
            self.meter.seconds += perf_counter() - start
        self.meter.steps += 1
        self._on_step()
        return True

    def _end(self, seconds: float) -> None:
        with self._state:
            self._left_s -= seconds
            self._working = False
            self._state.notify_all()
