"""One thread at a time: llama.cpp's context has no locks, and two threads in it end the process.

A generator may go from thread to thread, as web frameworks do it: a thread has the llama only while
it is inside.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from swift_gguf.errors import SwiftError

Item = TypeVar("Item")


class OneThread:
    """Who is inside; may be entered again by the same thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0
        self._depth = 0

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Raises:
        SwiftError: another thread is.
        """
        me = threading.get_ident()
        with self._lock:
            if self._depth and self._owner != me:
                raise SwiftError(
                    "another thread is using this llama; let threads wait for one another "
                    "(threading.Lock), or give each a llama of its own"
                )
            self._owner = me
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1

    def each(self, steps: Generator[Item, Any, None]) -> Generator[Item, Any, None]:
        """A generator whose every step is `inside`."""
        sent = None
        with closing(steps):
            while True:
                try:
                    with self.inside():
                        item = steps.send(sent)
                except StopIteration:
                    return
                sent = yield item
