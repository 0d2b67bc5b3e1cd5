"""A progress bar for downloads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from swift_gguf.hub.downloads import Progress

if TYPE_CHECKING:
    import rich.progress


@contextmanager
def download_progress(label: str = "downloading") -> Iterator[Progress]:
    """A `Progress` that draws a bar on stderr; it does nothing if stderr is not a terminal.

    The bar appears with the first report, so a model in the cache shows none.  It is erased at the
    end, also after an error.
    """
    if not sys.stderr.isatty():
        yield lambda done_bytes, total_bytes: None
        return
    bar: rich.progress.Progress | None = None
    task: rich.progress.TaskID | None = None

    def report(done_bytes: int, total_bytes: int, /) -> None:
        nonlocal bar, task
        if bar is None or task is None:
            bar = _bar()
            task = bar.add_task(label, total=total_bytes or None)
            bar.start()
        bar.update(task, completed=done_bytes, total=total_bytes or None)

    try:
        yield report
    finally:
        if bar is not None:
            bar.stop()


def _bar() -> rich.progress.Progress:
    # the import of rich takes a tenth of a second; do it only if a bar is drawn
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
    )
