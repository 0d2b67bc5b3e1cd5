"""Grammars from clients, checked before llama.cpp meets them.

What a few bytes could blow up to is limited here: schemas are converted in a bounded process, and
the repetitions of a grammar, which llama.cpp writes out, are counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from swift_gguf.bounded import Bounded
from swift_gguf.errors import GrammarError
from swift_gguf.native import library
from swift_gguf.sampling import grammar_sampler
from swift_gguf.server.errors import bad_request, one_line
from swift_gguf.server.options import (
    MAX_DEPTH,
    MAX_GRAMMAR_LENGTH,
    MAX_GRAMMAR_SIZE,
    MAX_REPETITION,
)

_converting = Bounded()
# comments, literals, classes, repetitions; anything else a character at a time.  What is not closed
# goes to the end: to look for it from every bracket would take for ever.
_TOKEN = re.compile(
    r"""#[^\n]*|"(?:[^"\\]|\\.)*"?|\[(?:[^\]\\]|\\.)*\]?|\{[^}]*\}?|\S""", re.DOTALL
)
_COUNT = re.compile(r"\d+")
_BRACKETED = re.compile(r"\\.|\[(?:[^\]\\]|\\.)*\]?|\{[^}]*\}?", re.DOTALL)
_SCHEMA_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")


def from_schema(schema: dict[str, Any], *, param: str) -> str:
    """GBNF for the JSON that a schema describes.

    Raises:
        ApiError: the schema is none, or describes too much.
    """
    text = json.dumps(schema)
    if len(text) > MAX_GRAMMAR_LENGTH:
        raise bad_request("the schema is too long", param=param)
    _limit_counts(schema, param)
    answer = _converting.ask({"schema": text})
    if "text" not in answer:
        raise bad_request(f"the schema cannot be converted: {answer['error']}", param=param)
    # JSON has no raw control characters in strings, which the converter forgets
    return answer["text"].replace(r'[^"\\]', r'[^"\\\x7F\x00-\x1F]')


def _limit_counts(schema: Any, param: str) -> None:
    """Tells counts that no grammar could have by their names, and brackets that nothing opened."""
    values = schema.values() if isinstance(schema, dict) else schema
    if isinstance(schema, dict):
        for name in _SCHEMA_COUNTS:
            count = schema.get(name)
            if isinstance(count, (int, float)) and not 0 <= count <= MAX_REPETITION:
                raise bad_request(f"{name} must be from 0 to {MAX_REPETITION}", param=param)
        pattern = schema.get("pattern")
        if isinstance(pattern, str) and re.search(r"[\]}]", _BRACKETED.sub("", pattern)):
            # the converter would never come to its end
            raise bad_request(
                "the schema's pattern has a ] or } that nothing opened; put a \\ before it",
                param=param,
            )
    for value in values:
        if isinstance(value, (dict, list)):
            _limit_counts(value, param)


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
