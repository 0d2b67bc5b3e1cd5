"""Progress and error messages, shared by all downloads."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from swift_gguf.errors import DownloadError

_POLL = 0.1  # seconds


class Progress(Protocol):
    """Called during a download, possibly from another thread; `done_bytes` never decreases."""

    def __call__(self, done_bytes: int, total_bytes: int, /) -> None: ...


class Meter:
    """Reports downloaded bytes to a `Progress`; they never decrease or exceed the total."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._high = progress, total, -1

    def __call__(self, done: int) -> None:
        if self._progress is not None and (done := min(done, self._total)) > self._high:
            self._high = done
            self._progress(done, self._total)


def failed(what: str, reason: str) -> DownloadError:
    return DownloadError(f"could not download {what}: {reason}")


def disk_reason(error: OSError, folder: Path, variable: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full; free some space for {folder} or set {variable} to another folder"
    return f"{error.strerror or error} ({folder}); set {variable} to a folder you can write to"


@contextlib.contextmanager
def watch(folder: Path, pattern: str, done: int, meter: Meter) -> Iterator[None]:
    """Reports the growth of the newest file below `folder`, which another program writes."""

    def look() -> None:
        while not finished.wait(_POLL):
            with contextlib.suppress(OSError, ValueError):  # no such file yet, or no longer
                stats = [path.stat() for path in folder.rglob(pattern) if path.is_file()]
                meter(done + max(stats, key=lambda stat: stat.st_mtime_ns).st_size)

    finished = threading.Event()
    thread = threading.Thread(target=look, name="swift-gguf-download", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
