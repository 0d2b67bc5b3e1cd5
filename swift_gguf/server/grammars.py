"""Grammars from clients, checked before llama.cpp meets them.

What a few bytes could blow up to is limited here: the repetitions of a grammar, which llama.cpp
writes out, are counted.
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

# comments, literals, classes, repetitions; anything else a character at a time.  What is not closed
# goes to the end: to look for it from every bracket would take for ever.
_TOKEN = re.compile(
    r"""#[^\n]*|"(?:[^"\\]|\\.)*"?|\[(?:[^\]\\]|\\.)*\]?|\{[^}]*\}?|\S""", re.DOTALL
)
_COUNT = re.compile(r"\d+")


def check(vocab: Any, gbnf: str, *, param: str) -> None:
    """Does llama.cpp take the grammar?  In the model's thread.

    Raises:
        ApiError: it does not parse, or is too large when repetitions are written out.
    """
    depth, size = 0, 0
    for character in gbnf:  # brackets in literals count too: the parser's stack is finite
        depth += (character == "(") - (character == ")")
        if depth > MAX_DEPTH * 32:
            raise bad_request("the grammar is nested too deep", param=param)
    for count, length in _repetitions(gbnf):
        size += count * length
        if count > MAX_REPETITION:
            raise bad_request(f"repetitions may not go beyond {MAX_REPETITION}", param=param)
        if size > MAX_GRAMMAR_SIZE:
            raise bad_request("the grammar's repetitions come to too much", param=param)
    try:
        library().api.llama_sampler_free(grammar_sampler(vocab, gbnf))
    except GrammarError as error:
        raise bad_request(one_line(error), param=param) from error


def _repetitions(gbnf: str) -> Iterator[tuple[int, int]]:
    """How often something is repeated, and its length at most, in characters."""
    length = 0
    for token in map(str, _TOKEN.findall(gbnf)):
        if token.startswith("{"):
            count = max((int(n[:9]) for n in _COUNT.findall(token)), default=0)
            yield count, length
            length *= max(1, count)
        elif not token.startswith("#"):
            length = len(token)
