"""Files that are written whole or not at all, and those that a long measurement ends in."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from swift_gguf.errors import SwiftError

DPI = 150


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` at the end of the block.

    Only its owner can read it.  After an error, `path` is as it was.

    Raises:
        OSError: the folder cannot be written to.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def require_folder(path: Path | None) -> None:
    """
    Raises:
        SwiftError: the file's folder does not exist.
    """
    if path is not None and not path.parent.is_dir():
        raise SwiftError(f"there is no folder {path.parent} to write {path.name} to; make it first")


def require_matplotlib() -> None:
    """
    Raises:
        SwiftError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SwiftError("a plot needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")  # a file needs no display


def panels(n: int) -> tuple[Any, list[Any]]:
    """A figure of matplotlib's, and n axes side by side in it.

    Raises:
        SwiftError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0 * n, 4.5), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, n, squeeze=False)[0]
    for panel in axes:
        panel.grid(alpha=0.3)
    return figure, list(axes)
