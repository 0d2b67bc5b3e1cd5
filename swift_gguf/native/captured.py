"""Captures what native code prints to standard error."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = threading.Lock()
"""The process has one standard error, so only one thread at a time may replace it."""


@contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Yields a list; at the end of the block it has the lines written to standard error.

    llama.cpp's grammar parser and ggml's check of weights print there directly.  The descriptor is
    shared by the whole process, so use this only around short calls.  Lines from other threads are
    captured too.
    """
    lines: list[str] = []
    with _STDERR:
        try:
            saved = os.dup(2)
        except OSError:  # standard error is closed
            yield lines
            return
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield lines
            finally:
                os.dup2(saved, 2)
                os.close(saved)
                file.seek(0)
                lines.extend(file.read().decode("utf-8", "replace").splitlines())
