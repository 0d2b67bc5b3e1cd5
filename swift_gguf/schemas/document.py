"""A JSON schema as a document: the places in it, and the targets of references."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from swift_gguf.errors import SchemaError

MAX_DEPTH = 64
"""Maximum nesting of objects and lists in a schema."""
ROOT = "http://schema/"
"""The base of references in a document without `$id`."""

Path = tuple[str | int, ...]
"""Keys and indices that lead from the root of a document to a place in it."""

VALUES = frozenset(("const", "enum", "default", "examples", "example"))
"""Keywords whose value is arbitrary JSON, not a schema."""
_PLAIN = re.compile(r"[A-Za-z_$][\w$-]*", re.ASCII)


class Document:
    """A schema with everything that it refers to.

    Raises:
        SchemaError: it is nested too deep.
    """

    def __init__(self, root: Any) -> None:
        self.root = root
        _limit_depth(root)

    def at(self, path: Path) -> Any:
        """The value at a place."""
        value = self.root
        for step in path:
            value = value[step]
        return value

    def resolve(self, path: Path, reference: Any) -> Path:
        """The target of a reference in the schema at `path`.

        Raises:
            SchemaError: it is not in this document.
        """
        if not isinstance(reference, str):
            raise refused(path, "$ref", "must be a text")
        url, fragment = urldefrag(_join(self._base(path), reference))
        resources, anchors = self._names
        start = resources.get(url)
        if start is None:
            raise refused(path, "$ref", f"{_short(reference)} is another document; put it in $defs")
        if fragment and not fragment.startswith("/"):
            found = anchors.get((url, unquote(fragment)))
        else:
            found = self._pointed(start, fragment)
        if found is None:
            raise refused(path, "$ref", f"there is no {_short(reference)}")
        return found

    def _pointed(self, start: Path, pointer: str) -> Path | None:
        """Follows a JSON pointer (RFC 6901) from a place."""
        path, value = start, self.at(start)
        for token in pointer.split("/")[1:]:
            step: str | int = unquote(token).replace("~1", "/").replace("~0", "~")
            if isinstance(value, list):
                if not re.fullmatch(r"0|[1-9][0-9]{0,8}", str(step)) or int(step) >= len(value):
                    return None
                step = int(step)
            elif not isinstance(value, dict) or step not in value:
                return None
            path, value = (*path, step), value[step]
        return path

    def _base(self, path: Path) -> str:
        base, value = ROOT, self.root
        for step in (*path, None):
            if isinstance(value, dict) and isinstance(value.get("$id"), str):
                base = _join(base, value["$id"])
            if step is not None:
                value = value[step]
        return base

    @cached_property
    def _names(self) -> tuple[dict[str, Path], dict[tuple[str, str], Path]]:
        """Places by the documents (`$id`) that begin there, and by anchor."""
        resources: dict[str, Path] = {ROOT: ()}
        anchors: dict[tuple[str, str], Path] = {}

        def walk(value: Any, path: Path, base: str) -> None:
            if isinstance(value, dict):
                if isinstance(value.get("$id"), str):
                    base = urldefrag(_join(base, value["$id"])).url
                    resources.setdefault(base, path)
                if isinstance(value.get("$anchor"), str):
                    anchors.setdefault((base, value["$anchor"]), path)
            for step, child in _steps(value):
                if step not in VALUES:
                    walk(child, (*path, step), base)

        walk(self.root, (), ROOT)
        return resources, anchors


def refused(path: Path, keyword: str, why: str = "is not supported; leave it out") -> SchemaError:
    """An error that names a place and the keyword there."""
    return SchemaError(": ".join(filter(None, (shown(path), f"{keyword} {why}"))), path=path)


def shown(path: Path) -> str:
    """A place as text: ``properties.tags.anyOf[1]``; empty for the root."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif _PLAIN.fullmatch(step):
            text += f".{step}" if text else step
        else:
            text += f"[{_short(step)}]"
    return text


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _join(base: str, reference: str) -> str:
    if reference.startswith("#"):  # also if the base is not a URL
        return urldefrag(base).url + reference
    try:
        return urljoin(base, reference)
    except ValueError:  # not a URL
        return reference


def _steps(value: Any) -> Iterator[tuple[str | int, Any]]:
    children = value.items() if isinstance(value, dict) else enumerate(value)
    return ((step, child) for step, child in children if isinstance(child, (dict, list)))


def _limit_depth(root: Any) -> None:
    level = [root] if isinstance(root, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [child for value in level for _, child in _steps(value)]
    if level:
        raise SchemaError(f"the schema is nested deeper than {MAX_DEPTH} levels; make it flatter")
