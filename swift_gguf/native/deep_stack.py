"""Runs calls that recurse once per character in a thread with a large stack.

For most vocabularies llama.cpp splits text with `std::regex` (`unicode_regex_split_stl`,
unicode.cpp), which GNU's library matches by recursion.  20,000 letters, digits or spaces without a
break need 4 to 8 MB of stack, and a stack overflow ends the process.  A thread can have a larger
stack, and only the used part of it takes memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from swift_gguf.errors import ContextFullError, SwiftError

BYTES_EACH = 1024
"""Bytes of stack per character; llama.cpp's patterns need at most 420."""
SHALLOW = 2048
"""Characters for which the normal stack of every thread is large enough."""
MOST = 1 << 20
"""Maximum number of characters; they need a stack of 1 GB."""

T = TypeVar("T")
_starting = threading.Lock()  # the size is one setting for all threads of the process


def on_deep_stack(n_characters: int, call: Callable[[], T]) -> T:
    """Calls `call` with enough stack to recurse `n_characters` deep; returns its result.

    Raises:
        ContextFullError: the text is too long.
        SwiftError: there is not enough memory for the stack.
    """
    if n_characters <= SHALLOW:
        return call()
    if n_characters > MOST:
        raise ContextFullError(
            f"the text has {n_characters} characters; at most {MOST} can be tokenised"
        )
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
            raise SwiftError("there is not enough memory to tokenise such a long text") from error
        finally:
            threading.stack_size(usual)
    return thread
