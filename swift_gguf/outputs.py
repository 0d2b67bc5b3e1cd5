"""The files that a long measurement ends in: what they need is checked before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift_gguf.errors import SwiftError

DPI = 150


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
