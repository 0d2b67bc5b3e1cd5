"""Grammars from clients, checked before llama.cpp meets them.

The conversion of JSON schemas is llama_cpp's; what a small schema could blow up to is limited here.
"""

from __future__ import annotations

import json
import re
from typing import Any

from swift_gguf.errors import GrammarError
from swift_gguf.native import library
from swift_gguf.sampling import grammar_sampler
from swift_gguf.server.errors import bad_request, one_line
from swift_gguf.server.options import MAX_DEPTH, MAX_GRAMMAR_LENGTH, MAX_REPETITION

_REPETITION = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")
_SCHEMA_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")


def from_schema(schema: dict[str, Any], *, param: str) -> str:
    """GBNF for the JSON that a schema describes.

    Raises:
        ApiError: the schema is none, or describes too much.
    """
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    text = json.dumps(schema)
    if len(text) > MAX_GRAMMAR_LENGTH:
        raise bad_request("the schema is too long", param=param)
    _limit_counts(schema, param)
    try:
        gbnf: str = json_schema_to_gbnf(text)
    except RecursionError:
        raise bad_request("the schema is nested too deep", param=param) from None
    except Exception as error:  # whatever the converter trips over is the schema's fault
        raise bad_request(
            f"the schema cannot be converted: {one_line(error)}", param=param
        ) from error
    # JSON has no raw control characters in strings, which the converter forgets
    gbnf = gbnf.replace(r'[^"\\]', r'[^"\\\x7F\x00-\x1F]')
    if len(gbnf) > 4 * MAX_GRAMMAR_LENGTH:
        raise bad_request("the schema describes too much; make it smaller", param=param)
    return gbnf


def _limit_counts(schema: Any, param: str) -> None:
    """Repetitions and patterns: a few bytes of schema, megabytes of grammar."""
    if isinstance(schema, list):
        for item in schema:
            _limit_counts(item, param)
        return
    if not isinstance(schema, dict):
        return
    for name in _SCHEMA_COUNTS:
        count = schema.get(name)
        if isinstance(count, (int, float)) and not 0 <= count <= MAX_REPETITION:
            raise bad_request(f"{name} must be from 0 to {MAX_REPETITION}", param=param)
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        _limit_repetitions(pattern, param)
    for value in schema.values():
        _limit_counts(value, param)


def _limit_repetitions(text: str, param: str) -> None:
    counts = [int(n[:9]) for match in _REPETITION.finditer(text) for n in match.groups() if n]
    if any(count > MAX_REPETITION for count in counts):
        raise bad_request(f"repetitions may not go beyond {MAX_REPETITION}", param=param)


def check(vocab: Any, gbnf: str, *, param: str) -> None:
    """Does llama.cpp take the grammar?  In the model's thread.

    Raises:
        ApiError: it does not parse.
    """
    _limit_repetitions(gbnf, param)
    depth = 0
    for character in gbnf:  # brackets in literals count too: the parser's stack is finite
        depth += (character == "(") - (character == ")")
        if depth > MAX_DEPTH * 32:
            raise bad_request("the grammar is nested too deep", param=param)
    try:
        library().api.llama_sampler_free(grammar_sampler(vocab, gbnf))
    except GrammarError as error:
        raise bad_request(one_line(error), param=param) from error
