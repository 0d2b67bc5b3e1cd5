"""llama.cpp's parsers of chat answers, in a separate library (native/chat).

`analyse` runs a template, which may do anything: call it only in a `Sandbox`.  A `Reader` accepts
any text and limits its own use of memory and time.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from swift_gguf.errors import NativeLibraryError
from swift_gguf.native.load import REINSTALL, find_library

ABI = 1

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "swift_chat_abi": (ctypes.c_int, []),
    "swift_chat_analyse": (ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_size_t]),
    "swift_chat_reader_new": (
        ctypes.c_void_p,
        [ctypes.c_char_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)],
    ),
    "swift_chat_reader_free": (None, [ctypes.c_void_p]),
    "swift_chat_read": (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_bool],
    ),
    "swift_chat_free": (None, [ctypes.c_void_p]),
}


@cache
def _library() -> ctypes.CDLL:
    folder = find_library()
    path = next(folder.glob("*swift_chat.*"), None)
    if path is None:
        raise NativeLibraryError(f"the chat library is not in {folder}; {REINSTALL}")
    return _load(path)


def _load(path: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"could not load {path}: {error}; {REINSTALL}") from error
    if (abi := loaded.swift_chat_abi()) != ABI:
        raise NativeLibraryError(
            f"the library {path} has ABI {abi}, this package needs {ABI}; {REINSTALL}"
        )
    return loaded


def _taken(pointer: int | None) -> str:
    """Copies a string of the library, and frees it."""
    if pointer is None:
        raise MemoryError
    try:
        return ctypes.string_at(pointer).decode("utf-8", "replace")
    finally:
        _library().swift_chat_free(pointer)


def check() -> None:
    """Checks that the library can be loaded.

    Raises:
        NativeLibraryError: it is missing, or belongs to another release.
    """
    _library()


def analyse(request: Mapping[str, Any]) -> str:
    """The syntax of a template's answers, as JSON for `Reader`; or {"error": ...}.

    request: see swift-chat.h.

    Raises:
        NativeLibraryError: there is no library.
    """
    text = json.dumps(request).encode()
    return _taken(_library().swift_chat_analyse(text, len(text)))


class Reader:
    """Parses answers of one syntax.  Threads may share it.

    syntax: from `analyse`.

    Raises:
        ValueError: the syntax is not valid.
        NativeLibraryError: there is no library.
    """

    def __init__(self, syntax: str) -> None:
        text, error = syntax.encode(), ctypes.c_void_p()
        self._handle = _library().swift_chat_reader_new(text, len(text), ctypes.byref(error))
        if not self._handle:
            raise ValueError(_taken(error.value))
        weakref.finalize(self, _library().swift_chat_reader_free, self._handle)

    def read(self, text: str, *, is_partial: bool) -> dict[str, Any]:
        """Parses an answer: `content`, `reasoning_content` and `tool_calls`.

        Each tool call has `id`, `name` and `arguments`.  All values are strings.

        is_partial: the answer is not finished, and its last tool call may be incomplete.

        Raises:
            ValueError: it does not fit the syntax, or exceeds the limits of memory or time.
        """
        given = text.encode("utf-8", "replace")
        said: dict[str, Any] = json.loads(
            _taken(_library().swift_chat_read(self._handle, given, len(given), is_partial))
        )
        if "error" in said:
            raise ValueError(said["error"])
        return said
