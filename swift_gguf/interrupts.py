"""Reacts to signals while llama.cpp computes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def heard(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` as soon as SIGINT (Ctrl-C), SIGTERM or SIGHUP arrives, if it has a handler.

    Python runs signal handlers only between its own instructions, and processing a long prompt may
    take seconds.  But Python writes the signal to the wakeup descriptor at once, and a thread
    reads it there.  Outside the main thread nothing is done, because no signals arrive there.

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
            if before >= 0:  # the descriptor of an event loop
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
