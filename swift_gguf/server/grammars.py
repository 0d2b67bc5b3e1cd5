"""Checks the grammars of clients before llama.cpp parses them.

llama.cpp writes out the repetitions of a grammar, so a few bytes may need much memory.  The size
with all repetitions written out is limited here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from swift_gguf.errors import GrammarError
from swift_gguf.native import library
from swift_gguf.sampling import grammar_sampler
from swift_gguf.server.errors import bad_request, one_line
from swift_gguf.server.options import (
    MAX_DEPTH,
    MAX_GRAMMAR_SIZE,
    MAX_REPETITION,
)

# Comments, literals, character classes, repetitions, and any other character.  An unclosed literal
# or class goes to the end of the text.  To look for its end from every bracket would take too long.
_TOKEN = re.compile(
    r"""#[^\n]*|"(?:[^"\\]|\\.)*"?|\[(?:[^\]\\]|\\.)*\]?|\{[^}]*\}?|\S""", re.DOTALL
)
_COUNT = re.compile(r"\d+")


def check(vocab: Any, gbnf: str, *, param: str) -> None:
    """Checks that llama.cpp accepts the grammar.  Called in the model's thread.

    Raises:
        ApiError: it does not parse, or it is too large with its repetitions written out.
    """
    depth, size = 0, 0
    # llama.cpp's parser recurses into groups, and its stack is finite; literals count, too
    for character in gbnf:
        depth += (character == "(") - (character == ")")
        if depth > MAX_DEPTH * 32:
            raise bad_request("the grammar is nested too deep; make it flatter", param=param)
    for count, length in _repetitions(gbnf):
        size += count * length
        if count > MAX_REPETITION:
            raise bad_request(f"a repetition may be at most {MAX_REPETITION}", param=param)
        if size > MAX_GRAMMAR_SIZE:
            raise bad_request("the grammar has too many repetitions; use fewer", param=param)
    try:
        library().api.llama_sampler_free(grammar_sampler(vocab, gbnf))
    except GrammarError as error:
        raise bad_request(one_line(error), param=param) from error


def _repetitions(gbnf: str) -> Iterator[tuple[int, int]]:
    """Yields the count of each repetition, and the greatest length of its item in characters."""
    length = 0
    for token in map(str, _TOKEN.findall(gbnf)):
        if token.startswith("{"):
            count = max((int(n[:9]) for n in _COUNT.findall(token)), default=0)
            yield count, length
            length *= max(1, count)
        elif not token.startswith("#"):
            length = len(token)
