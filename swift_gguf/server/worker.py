"""The thread that owns the model, and the queue of requests that wait for it.

The work of a job runs in that thread and yields events.  The submitter awaits them on the event
loop.  A job can be stopped at any time from any thread, while it waits and while it runs.
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
"""Time to wait for a load that was stopped.  It is short, because nothing can be lost."""


class Served(Protocol):
    """The interface of a model that the worker needs."""

    def interrupt(self) -> None:
        """Ends the current forward pass early.  Called from any thread."""
        ...

    def resume(self) -> None:
        """Reverts `interrupt`."""
        ...

    def rest(self) -> None:
        """No job waits.  Called in the worker's thread; a job that comes waits for it."""
        ...

    def close(self) -> None: ...


M = TypeVar("M", bound=Served)


class Job(Generic[M]):
    """Work on the model for one request."""

    def __init__(self, work: Callable[[M, Job[M]], Iterator[object]]) -> None:
        self.work = work
        self.reason: ApiError | None = None
        """The reason why it was stopped."""
        self.queue_s = 0.0
        self.expiry: asyncio.TimerHandle | None = None
        self._queued = perf_counter()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[object] = asyncio.Queue()

    def begin(self) -> None:
        """Notes that the job begins to run."""
        self.queue_s = perf_counter() - self._queued

    def check(self) -> None:
        """Called by the work wherever it can end.

        Raises:
            ApiError: the job was stopped.
        """
        if self.reason is not None:
            raise self.reason

    def post(self, event: object) -> None:
        """Sends an event, or the exception that ends the job, to the submitter."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended, so nobody awaits the event
            _log.debug("an event came after the end of the event loop")

    async def events(self) -> AsyncGenerator[object, None]:
        """Yields the events of the work, and raises its exception."""
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

    load: loads the model, in the thread.
    queue_size: the number of jobs that may wait, without the one that runs.
    on_loaded: called in the thread when the model is loaded or could not be loaded.  Not called if
        the worker was closed before.
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
        """The reason why the model could not be loaded."""
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
            ApiError: 503, because it is still loading or the server is shutting down.
        """
        if self._closing:
            raise self._closing
        if self.model is None:
            raise unavailable(
                "the model is still loading; try again later",
                code="loading",
                retry_s=LOADING_RETRY_S,
            )
        return self.model

    @contextmanager
    def vocabulary(self) -> Iterator[M]:
        """The model for use of its vocabulary, in any thread and while jobs run.

        The model is not closed meanwhile.

        Raises:
            ApiError: as in `require_model`.
        """
        with self._vocabulary:
            yield self.require_model()

    # -- the event loop's side ---------------------------------------------------------------------

    def submit(self, work: Callable[[M, Job[M]], Iterator[object]], *, timeout_s: float) -> Job[M]:
        """Queues work.  It is stopped `timeout_s` after this call, even if it still waits.

        Raises:
            ApiError: 503, because the queue is full, or as in `require_model`.
        """
        with self._state:
            self.require_model()
            is_free = self._current is None and not self._waiting
            if not is_free and len(self._waiting) >= self._queue_size:
                wait_s = fmean(self._durations) * (len(self._waiting) + 1)
                raise unavailable(
                    f"{len(self._waiting)} requests are already waiting; try again later",
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
                reason = unavailable(
                    "the request waited too long in the queue; try again later",
                    code="timeout",
                    retry_s=LOADING_RETRY_S,
                )
            else:
                reason = ApiError(
                    408,
                    "the answer exceeded the time limit; see --timeout",
                    code="timeout",
                )
            self.stop(job, reason)

    def stop(self, job: Job[M], reason: ApiError) -> None:
        """Stops a job, waiting or running.  The first reason counts.  A finished job is unchanged.

        The submitter gets the reason at once, even if llama.cpp takes long to return.
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
        """Refuses new jobs and waiting jobs.  The running job continues."""
        with self._state:
            self._closing = unavailable(reason, code="shutting_down", retry_s=SHUTDOWN_RETRY_S)
            while self._waiting:
                self._waiting.popleft().post(self._closing)

    def stop_current(self) -> None:
        """Stops the running job.  Called after `drain`."""
        if (job := self._current) and self._closing:
            self.stop(job, self._closing)

    def close(self, *, wait_s: float = 10.0) -> None:
        """Stops loading and all jobs, and frees the model.  It may not be used afterwards."""
        self.drain(reason="the server is shutting down")
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
        """True if the thread is still inside llama.cpp after `close`.  The interpreter must not be
        shut down then."""
        return self._thread.is_alive()

    # -- the thread's side -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            model = self._load()
        except BaseException as error:  # reported by `serve`
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
                del job
                if not self._waiting and not self._is_closed:
                    model.rest()
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
        # an exception refers to its frames, and these variables refer back: break the cycle
        end = job.reason = None
