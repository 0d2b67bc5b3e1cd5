"""What an answer must be: JSON by a schema, or calls of tools; as a grammar for `matching`."""

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
"""Characters of a schema as it is held: without annotations, and what no reference leads to."""
MAX_LEVELS = 4096
"""Of schemas in schemas, references followed."""
WHITESPACE = r"( |\n[ \t]{0,20})"
"""Once between any two parts: what people write, and no more, for some models would never stop."""
BEGIN, END = "<tool_call>", "</tool_call>"

MAX_LEXER_STATES = 50_000
"""Of one answer, a kilobyte or two each."""
_STACK_EACH = 16
"""Kilobytes of stack a level: llguidance recurses."""
_SEARCH_S = 1.5
"""Seconds to find out what it is that cannot be held."""
_SHORT_ESCAPES = 'nrbtf\\"'


@dataclass(frozen=True)
class Constraint:
    """What an answer must be.  Stands where llama_cpp takes a `LlamaGrammar`."""

    grammar: str
    """Of llguidance."""
    levels: int
    """How deep llguidance may recurse, to make a matcher of it."""


@dataclass(frozen=True)
class Tool:
    """What may be called."""

    name: str
    parameters: Any
    """A JSON schema of the arguments."""


def json_by(schema: Any) -> Constraint:
    """JSON that fits a schema.

    Raises:
        SchemaError: it is none, or asks for what cannot be held; the message names place and
            keyword.
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
        SchemaError: as `json_by`, of a tool's parameters.
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
    """One schema of a call of any of the tools; each tool's references are its own."""
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
    """Arguments are an object, also where a tool forgets to say so; a tool that says nothing of
    them has none, as OpenAI has it."""
    if parameters is None:
        return {"type": "object", "properties": {}}
    if parameters is True:
        return {"type": "object"}
    if not isinstance(parameters, dict):
        return parameters
    kinds = parameters.get("type")
    if kinds is not None and "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise refused((), "type", "of parameters must be object")
    return {**parameters, "type": "object"}


def _held(root: Any, *, prefix: str = "") -> Written:
    """The schema as it is held.

    Branches of an `anyOf` that cannot be held are left out while others remain: every answer fits
    nevertheless.
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
                raise SchemaError("no value fits the schema: none has an end")
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
            f"the schema is too long: {length} characters that limit the answer, of at most "
            f"{MAX_LENGTH}; make it smaller"
        )
    if _levels(written) > MAX_LEVELS:
        raise SchemaError("the schema is nested too deep through its references; make it flatter")


def _dispensable(
    document: Document, path: Path, without: frozenset[Path], referrers: dict[Path, Path]
) -> Path | None:
    """The branch of a union that is the schema at `path`, if others remain that are not null."""
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


# -- what it is that cannot be held ----------------------------------------------------------------


class _Search:
    """Looks for the smallest part of a schema that llguidance does not hold."""

    def __init__(self, document: Document) -> None:
        self._document, self._end = document, time.monotonic() + _SEARCH_S

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self._end

    def located(self, complaint: str, without: frozenset[Path]) -> SchemaError:
        """The error that names place and keyword, of a schema that is complained about."""
        path: Path = ()
        seen = {path}
        is_empty = _is_unsatisfiable(complaint)
        while not self.is_late:
            for child in self._children(path):
                if child in seen or child in without:
                    continue
                seen.add(child)
                found = self._complaint(child, without)
                # that an optional property can have no value is no complaint of the whole
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
        """The keyword without which the schema would be held."""
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
    """What llguidance says against a schema; empty if it holds it."""
    matcher = compiled(_grammar([written], "start: %json {0}"), _bytes(), _levels(written))
    if not matcher.is_error():
        matcher.compute_bitmask()  # some grammars without a text show only here
    return str(matcher.get_error()) if matcher.is_error() else ""


def _is_unsatisfiable(complaint: str) -> bool:
    return "Unsatisfiable" in complaint or "NoExtension" in complaint


def _why(complaint: str) -> str:
    if _is_unsatisfiable(complaint):
        return "leaves no value that fits"
    lines = complaint.splitlines()
    said = next((line for line in lines if line.startswith("error: ")), lines[0])
    said = re.sub(r"^.*failed to compile JSON schema: |^error: ", "", said)[:160]
    return f"cannot be held ({said}); leave it out"


# -- grammars --------------------------------------------------------------------------------------


def _constraint(parts: Sequence[Written], rules: str) -> Constraint:
    levels = sum(map(_levels, parts))
    if levels > MAX_LEVELS:
        raise SchemaError("the schemas are nested too deep through their references")
    return Constraint(_grammar(parts, rules), levels)


def _grammar(parts: Sequence[Written], rules: str) -> str:
    """In llguidance's dialect of Lark."""
    escapes = _SHORT_ESCAPES
    if any(part.has_controls for part in parts):
        # without it, names of properties have one spelling, so that none can be said twice
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
    """How deep llguidance may recurse at most: into schemas, along properties."""

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
    """A vocabulary of bytes: what is held does not depend on the model's."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")
