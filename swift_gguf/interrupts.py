"""Signals while llama.cpp computes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def heard(stop: Callable[[], None]) -> Iterator[None]:
    """Inside, `stop` is called as soon as a signal comes that has a handler: Ctrl-C, SIGTERM or
    SIGHUP.

    Python runs signal handlers between its own instructions only, and a pass over a long prompt may
    take seconds; but it writes the signal to a descriptor at once, which a thread waits for.  In
    the main thread; in others, where signals do not come, nothing is done.

    stop: called in another thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while numbers := os.read(reading, 64):
            if any(number in NUMBERS for number in numbers):
                stop()
            if before >= 0:  # an event loop's
                os.write(before, numbers)

    thread = threading.Thread(target=watch, name="swift-gguf-signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()
        os.close(reading)
