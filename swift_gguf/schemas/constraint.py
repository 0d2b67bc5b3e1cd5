"""Grammars for `matching`: the answer must be JSON that fits a schema, or tool calls."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from swift_gguf.errors import SchemaError
from swift_gguf.native.deep_stack import on_deep_stack
from swift_gguf.schemas.document import VALUES, Document, Path, refused, shown
from swift_gguf.schemas.endless import can_end
from swift_gguf.schemas.writing import HELD, Written, write

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


MAX_LENGTH = 64 * 1024
"""Characters of a translated schema: without annotations and unused definitions."""
MAX_LEVELS = 4096
"""Nested schemas, including those behind references."""
WHITESPACE = r"( |\n[ \t]{0,20})"
"""Allowed once between two parts of JSON.  With more, some models write blanks without end."""
BEGIN, END = "<tool_call>", "</tool_call>"

MAX_LEXER_STATES = 50_000
"""For one answer; each state takes one or two kilobytes."""
_STACK_EACH = 16
"""Kilobytes of stack per level: llguidance recurses."""
_SEARCH_S = 1.5
"""Seconds to find the keyword that is not supported."""
_SHORT_ESCAPES = 'nrbtf\\"'


@dataclass(frozen=True)
class Constraint:
    """A compiled schema.  It is passed where llama_cpp takes a `LlamaGrammar`."""

    grammar: str
    """llguidance's grammar."""
    levels: int
    """How deep llguidance may recurse to make a matcher from it."""


@dataclass(frozen=True)
class Tool:
    """A tool that the model may call."""

    name: str
    parameters: Any
    """A JSON schema of the arguments."""


def json_by(schema: Any) -> Constraint:
    """JSON that fits a schema.

    Raises:
        SchemaError: the schema is not valid, or a keyword is not supported; the message names the
            place and the keyword.
    """
    return _constraint([_held(schema)], "start: %json {0}")


def arguments_of(name: str, parameters: Any) -> Constraint:
    """The JSON object of a tool's arguments.

    Raises:
        SchemaError: as `json_by`; the message begins with the tool's name.
    """
    return _constraint([_parameters(Tool(name, parameters))], "start: %json {0}")


def call_of(tools: Sequence[Tool]) -> Constraint:
    """``{"name": ..., "arguments": ...}``, a call of one of the tools.

    Raises:
        SchemaError: as `json_by`, for a tool's parameters.
    """
    return _constraint([_calls(tools)], "start: %json {0}")


def answer_or_calls(schema: Any, tools: Sequence[Tool]) -> Constraint:
    """JSON that fits a schema, or one or several calls, each as ``<tool_call>...</tool_call>``.

    Raises:
        SchemaError: as `json_by` and `call_of`.
    """
    call = f'"{BEGIN}" /\\n?/ %json {{1}} /\\n?/ "{END}"'
    return _constraint(
        [_held(schema), _calls(tools)],
        f"start: answer | calls\nanswer: %json {{0}}\ncalls: call (/\\n?/ call)*\ncall: {call}",
    )


def _calls(tools: Sequence[Tool]) -> Written:
    """One schema for a call of any tool; each tool has definitions of its own."""
    calls: list[Any] = []
    definitions: dict[str, Any] = {}
    has_controls = False
    for i, tool in enumerate(tools):
        written = _parameters(tool, prefix=f"{i}.")
        definitions |= written.definitions
        has_controls |= written.has_controls
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "arguments": written.schema},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return Written({"anyOf": calls}, definitions, has_controls)


def _parameters(tool: Tool, *, prefix: str = "") -> Written:
    try:
        return _held(_of_object(tool.parameters), prefix=prefix)
    except SchemaError as error:
        raise SchemaError(f"{tool.name}: {error}", path=error.path) from error


def _of_object(parameters: Any) -> Any:
    """The schema of a tool's arguments, which are always an object.

    A tool without `parameters` has no arguments, as in OpenAI's API.
    """
    if parameters is None:
        return {"type": "object", "properties": {}}
    if parameters is True:
        return {"type": "object"}
    if not isinstance(parameters, dict):
        return parameters
    kinds = parameters.get("type")
    if kinds is not None and "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise refused((), "type", "of the parameters must be object")
    return {**parameters, "type": "object"}


def _held(root: Any, *, prefix: str = "") -> Written:
    """The schema translated for llguidance.

    Branches of an `anyOf` that are not supported are dropped while others remain: every answer
    still fits the schema.
    """
    document, without = Document(root), frozenset[Path]()
    search = _Search(document)
    while True:
        referrers: dict[Path, Path] = {}
        try:
            written = write(document, without=without, prefix=prefix, referrers=referrers)
            _limit(written)
            if complaint := _complaint(written):
                raise search.located(complaint, without)
            if not can_end(written):
                raise SchemaError("no value fits the schema: it would have to be endless")
            return written
        except SchemaError as error:
            branch = _dispensable(document, error.path, without, referrers)
            if branch is None or search.is_late:
                raise
            without |= {branch}


def _limit(written: Written) -> None:
    length = len(_text(written))
    if length > MAX_LENGTH:
        raise SchemaError(
            f"the schema is too long: {length} characters without annotations, at most "
            f"{MAX_LENGTH} are allowed; make it smaller"
        )
    if _levels(written) > MAX_LEVELS:
        raise SchemaError("the schema's references are nested too deep; make it flatter")


def _dispensable(
    document: Document, path: Path, without: frozenset[Path], referrers: dict[Path, Path]
) -> Path | None:
    """The branch of a union that contains `path`, if another branch remains that is not null."""
    seen = set()
    while path not in seen:
        seen.add(path)
        kind = path[-2] if len(path) > 1 and isinstance(path[-1], int) else None
        if kind in ("anyOf", "oneOf"):
            union = document.at(path[:-1])
            rest: list[Path] = [(*path[:-1], i) for i in range(len(union)) if i != path[-1]]
            if any(p not in without and not _is_null(document.at(p)) for p in rest):
                return path
            path = path[:-2]
        elif kind == "allOf":
            path = path[:-2]
        else:
            path = referrers.get(path, path)
    return None


def _is_null(schema: Any) -> bool:
    return isinstance(schema, dict) and (
        schema.get("type") == "null" or schema.get("const", 0) is None
    )


# -- finding what is not supported -----------------------------------------------------------------


class _Search:
    """Looks for the smallest part of a schema that llguidance does not support."""

    def __init__(self, document: Document) -> None:
        self._document, self._end = document, time.monotonic() + _SEARCH_S

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self._end

    def located(self, complaint: str, without: frozenset[Path]) -> SchemaError:
        """The error for llguidance's `complaint`, with the place and the keyword."""
        path: Path = ()
        seen = {path}
        is_empty = _is_unsatisfiable(complaint)
        while not self.is_late:
            for child in self._children(path):
                if child in seen or child in without:
                    continue
                seen.add(child)
                found = self._complaint(child, without)
                # an optional property without a possible value is not an error of the whole schema
                if found and (is_empty or not _is_unsatisfiable(found)):
                    path, complaint = child, found
                    break
            else:
                break
        why = _why(complaint)
        keyword = self._keyword(path, without)
        if keyword is None:
            where = f"{shown(path)}: " if path else ""
            return SchemaError(f"{where}the schema {why}", path=path)
        return refused(path, keyword, why)

    def _keyword(self, path: Path, without: frozenset[Path]) -> str | None:
        """The keyword without which llguidance would accept the schema."""
        schema = self._document.at(path)
        for keyword in sorted(schema, key="type".__eq__) if isinstance(schema, dict) else ():
            if keyword not in HELD or self.is_late:
                continue
            if not self._complaint(path, without | {(*path, keyword)}):
                return str(keyword)
        return None

    def _complaint(self, path: Path, without: frozenset[Path]) -> str:
        try:
            return _complaint(write(self._document, path, without=without))
        except SchemaError as error:
            return str(error)

    def _children(self, path: Path) -> Iterator[Path]:
        schema = self._document.at(path)
        for keyword, value in schema.items() if isinstance(schema, dict) else ():
            place: Path = (*path, keyword)
            if keyword not in HELD or keyword in VALUES:
                continue
            if keyword == "$ref" and value is not None:
                yield self._document.resolve(path, value)
            elif isinstance(value, list):
                yield from ((*place, i) for i, v in enumerate(value) if isinstance(v, dict))
            elif keyword in ("properties", "patternProperties"):
                yield from ((*place, name) for name, v in value.items() if isinstance(v, dict))
            elif isinstance(value, dict):
                yield place


def _complaint(written: Written) -> str:
    """llguidance's error for a schema; empty if it accepts it."""
    matcher = compiled(_grammar([written], "start: %json {0}"), _bytes(), _levels(written))
    if not matcher.is_error():
        matcher.compute_bitmask()  # some grammars that match no text fail only here
    return str(matcher.get_error()) if matcher.is_error() else ""


def _is_unsatisfiable(complaint: str) -> bool:
    return "Unsatisfiable" in complaint or "NoExtension" in complaint


def _why(complaint: str) -> str:
    if _is_unsatisfiable(complaint):
        return "allows no value"
    lines = complaint.splitlines()
    said = next((line for line in lines if line.startswith("error: ")), lines[0])
    said = re.sub(r"^.*failed to compile JSON schema: |^error: ", "", said)[:160]
    return f"is not supported ({said}); leave it out"


# -- grammars --------------------------------------------------------------------------------------


def _constraint(parts: Sequence[Written], rules: str) -> Constraint:
    levels = sum(map(_levels, parts))
    if levels > MAX_LEVELS:
        raise SchemaError("the schemas' references are nested too deep; make them flatter")
    return Constraint(_grammar(parts, rules), levels)


def _grammar(parts: Sequence[Written], rules: str) -> str:
    """In llguidance's dialect of Lark."""
    escapes = _SHORT_ESCAPES
    if any(part.has_controls for part in parts):
        # without \u, a property name has only one spelling and cannot occur twice
        escapes += "u"
    options = {"whitespace_pattern": WHITESPACE, "json_allowed_escapes": escapes}
    texts = [_text(part, {"x-guidance": options}) for part in parts]
    rules = re.sub(r"\{(\d)\}", lambda match: texts[int(match[1])], rules)
    return f'%llguidance {{"no_forcing": true}}\n{rules}'


def _text(written: Written, more: dict[str, Any] | None = None) -> str:
    schema = written.schema
    if isinstance(schema, bool):
        schema = {} if schema else {"anyOf": []}
    definitions = {"$defs": written.definitions} if written.definitions else {}
    return json.dumps({**(more or {}), **schema, **definitions})


def _levels(written: Written) -> int:
    """The deepest recursion of llguidance: into schemas, and along properties."""

    def depth(value: Any) -> int:
        if not isinstance(value, (dict, list)):
            return 0
        children = value.values() if isinstance(value, dict) else value
        return 1 + len(value) // 16 + max(map(depth, children), default=0)

    return sum(map(depth, (written.schema, *written.definitions.values())))


def compiled(grammar: str, tokenizer: LLTokenizer, levels: int) -> LLMatcher:
    from llguidance import LLMatcher
    from llguidance._lib import LLParserLimits

    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    return on_deep_stack(
        levels * _STACK_EACH, lambda: LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    )


@cache
def _bytes() -> LLTokenizer:
    """A vocabulary of bytes: whether a schema is supported does not depend on the model."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")
