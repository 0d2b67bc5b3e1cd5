"""Run the steps of a search: during generation (`OnTheFly`) and in idle time (`IdleSearch`).

The steps are the same.  Drivers differ in their windows and in the time they may take.
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
    """The time and the steps of a search so far."""

    seconds: float = 0.0
    steps: int = 0


class OnTheFly:
    """Runs steps between the cycles of a generation, within a share of its time.

    A step only begins when the time budget covers the longest of the latest steps.  If a step takes
    longer, the next one waits until the budget covers that, too.  Unused time is kept for later
    generations.

    window: makes the window of a step; None while the text is too short.
    cost_s: the expected time of a step, used for the first one.
    share: the share of the generation's time.  None: one step after every `interval` cycles, as
        SWIFT does.
    on_step: called after every step.
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
        except StoppedError:  # the generation is stopped, not the search
            raise
        except SpoiledError:  # the generation cannot continue either
            self._failed = True
            raise
        except SwiftError as error:  # the generation continues without the search
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
    """Runs steps in a thread of its own while the model is idle, on the text in its context.

    searcher: None: there is only other work (`before`).

    All other use of the model is inside `paused`.  The model's stop flag ends the current forward
    pass within one operation.  The text in the context does not change.

    window: makes a window of the current text; None if there is none.
    on_step: called in the thread after every step, while the thread still has the model.
    before: called in the thread before a step, for more urgent work.  True: it replaces the step.
    limit_s: the time limit for one text, which saves a laptop's battery.
    """

    def __init__(
        self,
        model: Model,
        searcher: Searcher | None,
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
    def paused(self, *, renews: bool = True) -> Iterator[None]:
        """Pauses the search, so that the caller may use the model.

        Afterwards the search continues on the text that is in the context then.  Calls may be
        nested, in one thread or several.  The callers must agree on who uses the model.

        renews: the text may be another one, so the time limit begins again.
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
                if renews:
                    self._left_s = self._limit_s
                self._state.notify_all()

    def close(self) -> None:
        """Ends the thread.  The model may be used freely afterwards.  May be called twice.

        Raises:
            The exception that ended the search, if there was one.
        """
        with self._state:
            self._closed = True
            self._wait_for_worker()
            self._state.notify_all()
        self._thread.join()
        if self._error:
            error, self._error = self._error, None
            raise error

    def end(self) -> None:
        """As `close`, but an error of the search is logged and not raised."""
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
            finally:  # an interrupt must not leave the flag raised
                self._model.stop.lower()

    def _run(self) -> None:
        while self._begin():
            start = perf_counter()
            try:
                worked = self._step()
            except StoppedError:
                worked = True
            except BaseException as error:  # raised by `close`
                self._error, worked = error, False
                self._closed = True
            self._end(perf_counter() - start if worked else self._limit_s)

    def _begin(self) -> bool:
        """Waits until the model is idle.  False: the thread should end."""
        with self._state:
            while not self._closed and (self._users or self._left_s <= 0):
                self._state.wait()
            self._working = not self._closed
            return self._working

    def _step(self) -> bool:
        """Runs a step.  False: there is nothing to do on this text."""
        if self._before():
            return True
        searcher = self._searcher
        window = None if searcher is None or searcher.done else self._window()
        if searcher is None or window is None:
            return False
        start = perf_counter()
        try:
            searcher.step(window)
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
