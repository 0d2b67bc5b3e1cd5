"""One thread owns the model; requests wait for it in a queue of limited length.

A job's work runs in that thread and yields events; whoever submitted it awaits them on the event
loop.  A job can be stopped at any time, from any thread, whether it waits or runs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from statistics import fmean
from time import perf_counter
from typing import Generic, Protocol, TypeVar

from swift_gguf.server.errors import ApiError, unavailable

_log = logging.getLogger("swift_gguf")

LOADING_RETRY_S = 2.0
SHUTDOWN_RETRY_S = 10.0
LOADING_END_S = 0.5
"""For a load that was told to end: there is nothing to lose."""


class Served(Protocol):
    """What the worker needs of a model."""

    def interrupt(self) -> None:
        """The pass under way ends early; called from any thread."""
        ...

    def resume(self) -> None:
        """Takes `interrupt` back."""
        ...

    def close(self) -> None: ...


M = TypeVar("M", bound=Served)


class Job(Generic[M]):
    """Work on the model for one request."""

    def __init__(self, work: Callable[[M, Job[M]], Iterator[object]]) -> None:
        self.work = work
        self.reason: ApiError | None = None
        """Why it was stopped."""
        self.queue_s = 0.0
        self.expiry: asyncio.TimerHandle | None = None
        self._queued = perf_counter()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[object] = asyncio.Queue()

    def begin(self) -> None:
        """Its turn has come."""
        self.queue_s = perf_counter() - self._queued

    def check(self) -> None:
        """Called by the work wherever it can end.

        Raises:
            ApiError: it was stopped.
        """
        if self.reason is not None:
            raise self.reason

    def post(self, event: object) -> None:
        """Hands an event, or the exception that ends the job, to whoever awaits it."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended; nobody awaits anything any more
            _log.debug("an event came after the end of the loop")

    async def events(self) -> AsyncGenerator[object, None]:
        """What the work yields, as it comes; what it raises is raised."""
        try:
            while (event := await self._events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            if self.expiry:
                self.expiry.cancel()


class Worker(Generic[M]):
    """The model's thread.

    load: makes the model, in the thread.
    queue_size: jobs that may wait, besides the one that runs.
    on_loaded: called in the thread when the model is there, or could not be loaded; not if the end
        came first.
    stop_loading: makes `load` end early; called from any thread.
    """

    def __init__(
        self,
        load: Callable[[], M],
        *,
        queue_size: int,
        on_loaded: Callable[[], None],
        stop_loading: Callable[[], None] = lambda: None,
    ) -> None:
        self.model: M | None = None
        self.error: BaseException | None = None
        """Why there is no model and will be none."""
        self._load, self._queue_size, self._on_loaded = load, queue_size, on_loaded
        self._stop_loading, self._is_loading = stop_loading, True
        self._state = threading.Condition()
        self._vocabulary = threading.Lock()
        self._waiting: deque[Job[M]] = deque()
        self._current: Job[M] | None = None
        self._closing: ApiError | None = None
        self._is_closed = False
        self._durations: deque[float] = deque([1.0], maxlen=16)
        self._thread = threading.Thread(target=self._run, name="swift-gguf-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        return int(self._current is not None)

    def require_model(self) -> M:
        """The model.

        Raises:
            ApiError: 503: it is still being loaded, or the server shuts down.
        """
        if self._closing:
            raise self._closing
        if self.model is None:
            raise unavailable("loading the model", code="loading", retry_s=LOADING_RETRY_S)
        return self.model

    @contextmanager
    def vocabulary(self) -> Iterator[M]:
        """The model, not closed meanwhile; for what may be done beside jobs, in any thread.

        Raises:
            ApiError: as `require_model`.
        """
        with self._vocabulary:
            yield self.require_model()

    # -- the event loop's side ---------------------------------------------------------------------

    def submit(self, work: Callable[[M, Job[M]], Iterator[object]], *, timeout_s: float) -> Job[M]:
        """Queues work, which is stopped after `timeout_s`, its wait included.

        Raises:
            ApiError: 503: too many wait, or as `require_model`.
        """
        with self._state:
            self.require_model()
            is_free = self._current is None and not self._waiting
            if not is_free and len(self._waiting) >= self._queue_size:
                wait_s = fmean(self._durations) * (len(self._waiting) + 1)
                raise unavailable(
                    f"{len(self._waiting)} requests wait already; try again later",
                    code="queue_full",
                    retry_s=min(wait_s, 60.0),
                )
            job = Job(work)
            self._waiting.append(job)
            self._state.notify_all()
        job.expiry = asyncio.get_running_loop().call_later(timeout_s, self._expire, job)
        return job

    def _expire(self, job: Job[M]) -> None:
        with self._state:
            if job in self._waiting:
                reason = unavailable("waited too long", code="timeout", retry_s=LOADING_RETRY_S)
            else:
                reason = ApiError(408, "the answer took longer than is allowed", code="timeout")
            self.stop(job, reason)

    def stop(self, job: Job[M], reason: ApiError) -> None:
        """Ends a job, whatever it does; the first reason counts.  Nothing happens to a done one.

        Who awaits it hears of it at once, even if llama.cpp should not come back for long.
        """
        with self._state:
            is_running = job is self._current and self.model is not None and job.reason is None
            if job in self._waiting:
                self._waiting.remove(job)
            elif not is_running:
                return
            job.reason = reason
            job.post(reason)
            if is_running and self.model is not None:
                self.model.interrupt()

    def drain(self, *, reason: str) -> None:
        """No new jobs; those that wait are told; the running one goes on."""
        with self._state:
            self._closing = unavailable(reason, code="shutting_down", retry_s=SHUTDOWN_RETRY_S)
            while self._waiting:
                self._waiting.popleft().post(self._closing)

    def stop_current(self) -> None:
        """Ends the running job; after `drain`."""
        if (job := self._current) and self._closing:
            self.stop(job, self._closing)

    def close(self, *, wait_s: float = 10.0) -> None:
        """Ends all jobs, or the load, and frees the model; nobody may ask for it any more."""
        self.drain(reason="the server shuts down")
        self.stop_current()
        with self._state:
            self._is_closed = True
            self._state.notify_all()
            if self._is_loading:
                self._stop_loading()
                wait_s = min(wait_s, LOADING_END_S)
        if self._thread.is_alive():
            self._thread.join(wait_s)

    @property
    def is_stuck(self) -> bool:
        """After `close`: is the thread still inside llama.cpp, under which the interpreter must not
        fall apart?"""
        return self._thread.is_alive()

    # -- the thread's side -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            model = self._load()
        except BaseException as error:  # told to whoever runs the server
            with self._state:
                self._is_loading = False
                if self._is_closed:
                    return
                self.error = error
            self._on_loaded()
            return
        with self._state:
            self._is_loading = False
            self.model = model
            has_ended = self._is_closed
        if not has_ended:
            self._on_loaded()
        try:
            while (job := self._next()) is not None:
                self._work(model, job)
        finally:
            with self._vocabulary:
                self.model = None
                model.close()

    def _next(self) -> Job[M] | None:
        with self._state:
            while not self._waiting and not self._is_closed:
                self._state.wait()
            if not self._waiting:
                return None
            self._current = self._waiting.popleft()
            return self._current

    def _work(self, model: M, job: Job[M]) -> None:
        start = perf_counter()
        job.begin()
        try:
            for event in job.work(model, job):
                job.post(event)
            end: object = None
        except Exception as error:
            end = job.reason or error
        with self._state:
            self._current = None
            model.resume()
            self._durations.append(perf_counter() - start)
        job.post(end)
        # an exception holds the frames it went through, and they, by these, the exception
        end = job.reason = None
