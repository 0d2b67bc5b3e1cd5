"""Translates a JSON schema to the keywords that llguidance supports, or names what is unsupported.

Every answer that fits the translation fits the schema.  The reverse is not always true: an object
that does not mention further properties gets none, and numbers have limited lengths.  Annotations
are dropped, and references point to numbered definitions.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Any

from swift_gguf.errors import SchemaError
from swift_gguf.schemas.disjoint import Prover, declared
from swift_gguf.schemas.document import Document, Path, refused, shown
from swift_gguf.schemas.keywords import EXCLUSIVE, PLAIN, STEP, as_list, is_whole, pattern
from swift_gguf.schemas.patterns import FORMATS, KNOWN_FORMATS

IN_PLACE = frozenset(("allOf", "anyOf", "oneOf", "$ref"))
"""Keywords whose schemas apply to the same value."""
NEVER = (
    "not", "if", "contains", "dependentSchemas", "dependentRequired", "dependencies",
    "$dynamicRef", "$recursiveRef",
)  # fmt: skip
"""Keywords that limit answers and are not supported."""
HELD = IN_PLACE | frozenset((
    "type", "const", "enum", "properties", "required", "additionalProperties", "patternProperties",
    "propertyNames", "unevaluatedProperties", "minProperties", "maxProperties", "items",
    "prefixItems", "additionalItems", "unevaluatedItems", "minItems", "maxItems", "uniqueItems",
    "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "multipleOf",
))  # fmt: skip
MAX_PROPERTIES = 2000
"""For one object."""
MAX_PATTERNS = 48
"""Patterns of property names in a document: llguidance compares all pairs."""
MAX_ARRAYS = 100
"""For `uniqueItems`: arrays of distinct values that are listed one by one."""

_CONTROLS = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_NULLS = ({"type": "null"}, {"const": None})
_NO_NAMES = frozenset(("patternProperties", "propertyNames", "unevaluatedProperties"))


@dataclass
class Written:
    """A schema translated for llguidance, and its definitions."""

    schema: Any
    definitions: dict[str, Any] = field(default_factory=dict)
    has_controls: bool = False
    """True if a text has control characters without a short escape in JSON."""


def write(
    document: Document,
    start: Path = (),
    *,
    without: frozenset[Path] = frozenset(),
    prefix: str = "",
    referrers: dict[Path, Path] | None = None,
) -> Written:
    """Translates the schema at a place of a document.

    without: places to drop: branches of an `anyOf`, or keywords.
    prefix: begins the names of definitions.
    referrers: is filled: maps the target of a reference to the first schema that refers to it.

    Raises:
        SchemaError: a keyword is not valid or not supported.
    """
    return _Writer(document, without, prefix, {} if referrers is None else referrers).run(start)


class _Writer:
    def __init__(
        self,
        document: Document,
        without: frozenset[Path],
        prefix: str,
        referrers: dict[Path, Path],
    ) -> None:
        self._document, self._without, self._prefix = document, without, prefix
        self._prover, self._referrers = Prover(document), referrers
        self._names: dict[tuple[Path, bool, str], str] = {}
        self._pending: list[tuple[Path, bool, str, str]] = []
        self._n_patterns = 0
        self._written = Written(None)

    def run(self, start: Path) -> Written:
        written = self._written
        written.schema = self._schema(start, closes=True)
        while self._pending:
            path, closes, tag, name = self._pending.pop()
            written.definitions[name] = self._schema(path, closes=closes, tag=tag)
        return written

    def _schema(self, path: Path, *, closes: bool, tag: str = "") -> Any:
        """
        closes: no other schema applies to the value, so an object may be closed.
        tag: the property that distinguishes the branches of a union; objects must have it.
        """
        schema = self._document.at(path)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            where = shown(path) or "the schema"
            raise SchemaError(f"{where} must be an object, true or false", path=path)
        schema = {
            name: value
            for name, value in schema.items()
            if (value is not None or name == "const") and (*path, name) not in self._without
        }
        for name in NEVER:
            if name in schema and not _says_nothing(name, schema):
                raise refused(path, name)
        inner_tag = _tag(schema) or tag
        schema = {name: value for name, value in schema.items() if name in HELD}
        others = schema.keys() - {"type"}
        closes_inner = closes and len(others) == 1
        written: dict[str, Any] = {}
        for name, value in schema.items():
            handler = PLAIN.get(name)
            place = (*path, name)
            if name in IN_PLACE:
                said = self._in_place(path, name, value, closes=closes_inner, tag=inner_tag)
                for key, more in said.items():
                    _join(written, key, more)
            elif name == "additionalItems" and not isinstance(schema.get("items"), list):
                continue  # has no effect
            elif name in ("items", "additionalItems") and isinstance(value, (dict, bool)):
                written[name] = self._schema(place, closes=True)
            elif name in ("items", "prefixItems"):
                written[name] = self._list(path, name, value)
            elif name in ("properties", "patternProperties"):
                written[name] = self._map(path, name, value)
            elif name == "additionalProperties":
                written[name] = self._schema(place, closes=True)
            elif handler is not None:
                written[name] = handler(path, name, value, schema)
                if name in ("const", "enum"):
                    self._note(value)
            elif name == "format" and value in KNOWN_FORMATS:
                written[name] = value
        if tag in written.get("properties", ()) and tag not in schema.get("required", ()):
            schema = {**schema, "required": [*schema.get("required", ()), tag]}
        self._object(path, schema, written, closes=closes)
        self._array(path, schema, written)
        for name, (inclusive, sign) in EXCLUSIVE.items():
            bound = written.get(name)
            if isinstance(bound, bool):  # draft 4
                del written[name]
                bound = written.get(inclusive) if bound else None
                written |= {} if bound is None else {name: bound}
            if bound is not None and not is_whole(schema):
                del written[name]
                _join(written, inclusive, bound + sign * STEP * max(1.0, abs(bound)))
        if (as_pattern := FORMATS.get(str(schema.get("format")))) is not None:
            _join(written, "pattern", as_pattern)
        return written

    # -- schemas in schemas ------------------------------------------------------------------------

    def _in_place(
        self, path: Path, name: str, value: Any, *, closes: bool, tag: str
    ) -> dict[str, Any]:
        if name == "$ref":
            return {"$ref": self._reference(path, value, closes=closes, tag=tag)}
        branches = as_list(path, name, value)
        places: list[Path] = [(*path, name, i) for i in range(len(branches))]
        if not places:
            raise refused(path, name, "is empty")
        if name == "allOf":
            closes = closes and len(places) == 1
            return {name: [self._schema(place, closes=closes) for place in places]}
        forbidden = self._kept_apart(path, places, closes) if name == "oneOf" else {}
        places = [place for place in places if place not in self._without] or places
        written, failed = [], None
        for place in places:
            try:
                written.append(self._branch(place, forbidden.get(place, ()), closes, tag))
            except SchemaError as error:
                if error.path != place:
                    raise
                failed = error  # this branch can be dropped if there is another
        if failed is not None and all(branch in _NULLS for branch in written):
            raise failed
        return {"anyOf": written}

    def _branch(self, place: Path, forbidden: tuple[str, ...], closes: bool, tag: str) -> Any:
        if not forbidden:
            return self._schema(place, closes=closes, tag=tag)
        never = {"properties": dict.fromkeys(forbidden, False)}
        return {"allOf": [self._schema(place, closes=closes), never]}

    def _kept_apart(
        self, path: Path, places: list[Path], closes: bool
    ) -> dict[Path, tuple[str, ...]]:
        """For each branch of a `oneOf`: properties to forbid, so that no value fits two of them."""
        forbidden: dict[Path, set[str]] = {}
        prover, types = self._prover, declared(self._document.at(path).get("type"))
        if prover.are_told_apart(places, types):
            return {}
        for a, b in itertools.combinations(places, 2):
            if prover.is_disjoint(a, b, types=types):
                continue
            for one, other in ((a, b), (b, a)):
                closed = closes and self._is_closed(one)
                if closed and prover.is_disjoint(one, other, types=types, closes=True):
                    continue
                name = self._telling(one, other, types)
                if name is None:
                    raise refused(
                        path,
                        "oneOf",
                        f"is not supported: a value may fit both [{a[-1]}] and [{b[-1]}]; add a "
                        "property with different const values, or use anyOf",
                    )
                forbidden.setdefault(one, set()).add(name)
        return {place: tuple(sorted(names)) for place, names in forbidden.items()}

    def _telling(self, one: Path, other: Path, types: frozenset[str]) -> str | None:
        """A property that `other` requires and `one` does not."""
        ours, theirs = self._prover.shapes(one), self._prover.shapes(other)
        if ours is None or theirs is None or len(ours) != 1 or len(theirs) != 1:
            return None
        if ours[0].types & theirs[0].types & types != {"object"}:
            return None
        names = theirs[0].required - ours[0].required
        return min(names - ours[0].properties.keys() or names, default=None)

    def _is_closed(self, path: Path) -> bool:
        """True if the translation of this place is a closed object."""
        seen: set[Path] = set()
        while path not in seen:
            seen.add(path)
            schema = self._document.at(path)
            if not isinstance(schema, dict):
                return False
            if schema.get("$ref") is None:
                return _can_close(schema)
            if any(name in HELD and name != "$ref" for name in schema):
                return False
            path = self._document.resolve(path, schema["$ref"])
        return False

    def _reference(self, path: Path, reference: Any, *, closes: bool, tag: str) -> str:
        target, seen = self._document.resolve(path, reference), {path}
        while target not in seen:  # follow references to references
            schema = self._document.at(target)
            if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
                break
            if any(name in HELD and name != "$ref" for name in schema):
                break
            seen.add(target)
            target = self._document.resolve(target, schema["$ref"])
        self._referrers.setdefault(target, path)
        key = (target, closes, tag)
        if key not in self._names:
            self._names[key] = f"{self._prefix}{len(self._names)}"
            self._pending.append((*key, self._names[key]))
        return f"#/$defs/{self._names[key]}"

    def _list(self, path: Path, name: str, value: Any) -> list[Any]:
        items = as_list(path, name, value)
        return [self._schema((*path, name, i), closes=True) for i in range(len(items))]

    def _map(self, path: Path, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refused(path, name, "must be an object of schemas")
        if len(value) > MAX_PROPERTIES:
            raise refused(path, name, f"has too many entries: at most {MAX_PROPERTIES}")
        if name == "patternProperties":
            self._n_patterns += len(value)
            if self._n_patterns > MAX_PATTERNS:
                raise refused(path, name, f"has too many entries: at most {MAX_PATTERNS} in total")
        self._note([*value])
        written = {key: self._schema((*path, name, key), closes=True) for key in value}
        if name == "patternProperties":
            return {pattern(path, name, key): schema for key, schema in written.items()}
        return written

    # -- objects -----------------------------------------------------------------------------------

    def _object(
        self, path: Path, schema: dict[str, Any], written: dict[str, Any], *, closes: bool
    ) -> None:
        if "required" in schema:
            names = as_list(path, "required", schema["required"])
            if not all(isinstance(name, str) for name in names):
                raise refused(path, "required", "must be a list of names")
            self._note(names)
            if len(names) > MAX_PROPERTIES:
                raise refused(path, "required", f"has too many names: at most {MAX_PROPERTIES}")
            written["required"] = list(dict.fromkeys(names))
        if "unevaluatedProperties" in schema:
            self._unevaluated(path, schema, written)
        if "propertyNames" in schema:
            self._property_names(path, schema, written)
        if closes and _can_close(schema):
            extra = [n for n in written.get("required", ()) if n not in written["properties"]]
            written["properties"] |= dict.fromkeys(extra, True)
            written["additionalProperties"] = False
        is_open = written.get("additionalProperties", True) is not False
        n_more = written.get("minProperties", 0) - len(written.get("required", ()))
        if n_more > 1 and (is_open or written.get("patternProperties")):
            raise refused(path, "minProperties", "is not supported: a name may occur twice")

    def _unevaluated(self, path: Path, schema: dict[str, Any], written: dict[str, Any]) -> None:
        """Translates `unevaluatedProperties` to `additionalProperties`.

        It also counts the properties that `$ref` and `allOf` name.
        """
        value = self._schema((*path, "unevaluatedProperties"), closes=True)
        if value in (True, {}) or "additionalProperties" in schema:
            return
        names = self._evaluated(path, frozenset())
        if names is None:
            raise refused(path, "unevaluatedProperties")
        properties = written.setdefault("properties", {})
        properties |= {name: True for name in names if name not in properties}
        written["additionalProperties"] = value

    def _evaluated(self, path: Path, seen: frozenset[Path]) -> list[str] | None:
        """The properties that the schema, `$ref` and `allOf` name; None if the value decides."""
        schema = self._document.at(path)
        if not isinstance(schema, dict) or path in seen:
            return []
        if any(schema.get(n) is not None for n in ("anyOf", "oneOf", "patternProperties")):
            return None
        inner: list[Path] = []
        if schema.get("$ref") is not None:
            inner.append(self._document.resolve(path, schema["$ref"]))
        inner += [(*path, "allOf", i) for i in range(len(schema.get("allOf") or ()))]
        names = list(schema.get("properties") or ())
        for place in inner:
            more = self._evaluated(place, seen | {path})
            if more is None:
                return None
            names += more
        return names

    def _property_names(self, path: Path, schema: dict[str, Any], written: dict[str, Any]) -> None:
        """Translates listed names to `properties`, and a pattern to `patternProperties`."""
        place = (*path, "propertyNames")
        names = self._schema(place, closes=True)
        if names in (True, {}, {"type": "string"}):
            return
        if _NO_NAMES & schema.keys() > {"propertyNames"} or written.get("properties"):
            raise refused(
                path, "propertyNames", "is not supported beside other names; leave it out"
            )
        value = written.get("additionalProperties", True)
        allowed = self._prover.values(place)
        while isinstance(names, dict) and names.keys() == {"$ref"}:
            target = self._document.resolve(place, self._document.at(place)["$ref"])
            place, names = target, self._schema(target, closes=True)
        if allowed is not None:
            texts = [name for name in allowed if isinstance(name, str)]
            self._note(texts)
            written["properties"] = dict.fromkeys(texts, value)
        else:
            written["patternProperties"] = {_one_pattern(path, names): value}
        written["additionalProperties"] = False

    # -- arrays ------------------------------------------------------------------------------------

    def _array(self, path: Path, schema: dict[str, Any], written: dict[str, Any]) -> None:
        if "unevaluatedItems" in schema:
            value = self._schema((*path, "unevaluatedItems"), closes=True)
            if value not in (True, {}):
                if IN_PLACE & schema.keys():
                    raise refused(path, "unevaluatedItems")
                written.setdefault("items", value)
        if schema.get("uniqueItems") is True and not self._is_unique(path, schema, written):
            raise refused(path, "uniqueItems")

    def _is_unique(self, path: Path, schema: dict[str, Any], written: dict[str, Any]) -> bool:
        """Translates `uniqueItems` to a list of all arrays; False if there are too many."""
        if written.get("maxItems", 2) < 2:
            return True
        if "prefixItems" in schema or not isinstance(schema.get("items"), dict):
            return False
        values = self._prover.values((*path, "items"))
        if values is None or schema.get("type") != "array" or IN_PLACE & schema.keys():
            return False
        most = min(len(values), schema.get("maxItems", len(values)))
        least = schema.get("minItems", 0)
        if sum(math.perm(len(values), n) for n in range(most + 1)) > MAX_ARRAYS:
            return False
        arrays = [
            list(array)
            for n in range(least, most + 1)
            for array in itertools.permutations(values, n)
        ]
        written.clear()
        written["enum"] = arrays
        return True

    # -- texts -------------------------------------------------------------------------------------

    def _note(self, value: Any) -> None:
        """Looks for control characters in texts."""
        if isinstance(value, str):
            self._written.has_controls |= bool(_CONTROLS.search(value))
        elif isinstance(value, (list, dict)):
            for item in [*value, *(value.values() if isinstance(value, dict) else ())]:
                self._note(item)


def _join(written: dict[str, Any], name: str, value: Any) -> None:
    """Adds a keyword; keeps the same keyword's earlier value by means of `allOf`."""
    if name == "allOf":
        written[name] = [*written.get(name, ()), *value]
    elif name in written:
        _join(written, "allOf", [{name: value}])
    else:
        written[name] = value


def _can_close(schema: dict[str, Any]) -> bool:
    """True if the schema does not say whether an object may have further properties."""
    return isinstance(schema.get("properties"), dict) and not any(
        schema.get(name) is not None
        for name in (*IN_PLACE, *_NO_NAMES, "additionalProperties", "minProperties")
    )


def _tag(schema: dict[str, Any]) -> str:
    """The property that distinguishes a union's branches (OpenAPI, Pydantic); empty if unnamed."""
    discriminator = schema.get("discriminator")
    name = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    return name if isinstance(name, str) else ""


def _says_nothing(name: str, schema: dict[str, Any]) -> bool:
    value = schema[name]
    if name == "if":
        return "then" not in schema and "else" not in schema
    if name == "contains":
        return schema.get("minContains") == 0 and "maxContains" not in schema
    return value is False if name == "not" else value == {}


def _one_pattern(path: Path, names: Any) -> str:
    """The pattern for the names that a schema of strings allows."""
    names = {k: v for k, v in names.items() if k != "type"} if isinstance(names, dict) else names
    if isinstance(names, dict):
        if names.keys() == {"pattern"}:
            return str(names["pattern"])
        if names and names.keys() <= {"minLength", "maxLength"}:
            least, most = names.get("minLength", 0), names.get("maxLength", "")
            return f"^(?s:.{{{least},{most}}})$"
    raise refused(
        path, "propertyNames", "is not supported: use only enum, only const or only a pattern"
    )
