"""Removes byte order marks from a checkpoint's files, which the converter cannot read."""

from __future__ import annotations

import codecs
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEXTS = (".json", ".jinja", ".txt")
_FOLDERS = ("additional_chat_templates",)


@contextmanager
def without_marks(folder: Path) -> Iterator[Path]:
    """Yields the folder itself, or, if a file has a mark, a temporary one with clean copies."""
    if not any(map(_is_marked, _files(folder))):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="swift-gguf-") as temporary:
        mirror = Path(temporary) / folder.resolve().name  # models are named by their folder
        for path in _files(folder):
            other = mirror / path.relative_to(folder)
            other.parent.mkdir(parents=True, exist_ok=True)
            if _is_marked(path):
                other.write_bytes(path.read_bytes().removeprefix(codecs.BOM_UTF8))
            else:
                other.symlink_to(path.resolve())
        yield mirror


def _files(folder: Path) -> Iterator[Path]:
    for where in (folder, *(folder / name for name in _FOLDERS)):
        if where.is_dir():
            yield from (path for path in where.iterdir() if path.is_file())


def _is_marked(path: Path) -> bool:
    if path.suffix not in _TEXTS:
        return False
    with path.open("rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
