"""What native code prints instead of logging it."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = threading.Lock()
"""There is one such descriptor: who saved another one's replacement would restore that."""


@contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Lines that native code writes straight to standard error inside the block.

    llama.cpp's grammar parser does, and ggml's check of weights.  The descriptor is the process's
    own, so this must stay around short calls; what other threads write is among them.
    """
    lines: list[str] = []
    with _STDERR:
        try:
            saved = os.dup(2)
        except OSError:  # closed: nothing can be written there anyway
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
