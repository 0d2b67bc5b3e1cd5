"""Calls into llama.cpp that recurse once for every character, on a stack as deep as that takes.

Most vocabularies split text by `std::regex`, which GNU's library matches by recursion
(`unicode_regex_split_stl`, unicode.cpp): 20,000 letters, digits or spaces without a break take
between 4 and 8 MB, and where the stack ends, so does the process.  A thread's stack can be as large
as is asked for, and only what is used of it takes memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from swift_gguf.errors import ContextFullError, SwiftError

BYTES_EACH = 1024
"""Of stack a character: at most 420 were needed by any of llama.cpp's patterns."""
SHALLOW = 2048
"""Characters that any thread's own stack is enough for."""
MOST = 1 << 20
"""Characters; a stack of 1 GB."""

T = TypeVar("T")
_starting = threading.Lock()  # the size is one setting for all threads of the process


def on_deep_stack(n_characters: int, call: Callable[[], T]) -> T:
    """What `call` returns or raises, which may recurse as deep as a text has characters.

    Raises:
        ContextFullError: the text is too long.
        SwiftError: there is no memory for such a stack.
    """
    if n_characters <= SHALLOW:
        return call()
    if n_characters > MOST:
        raise ContextFullError(f"a text of {n_characters} characters; at most {MOST} can be split")
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:
            failed.append(error)

    _start(threading.Thread(target=run), (SHALLOW + n_characters) * BYTES_EACH).join()
    if failed:
        raise failed[0]
    return done[0]


def _start(thread: threading.Thread, stack: int) -> threading.Thread:
    with _starting:
        usual = threading.stack_size(stack)
        try:
            thread.start()
        except RuntimeError as error:
            raise SwiftError("there is no memory to split so long a text into tokens") from error
        finally:
            threading.stack_size(usual)
    return thread
