"""Proves that no value fits two schemas.  `oneOf` needs this, and a grammar cannot check it.

`True` is certain; `False` only means that no proof was found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from swift_gguf.schemas.document import Document, Path

ALL = frozenset(("null", "boolean", "integer", "fraction", "string", "array", "object"))
"""Types of JSON; ``number`` is integers and fractions."""
MAX_ALTERNATIVES = 64
MAX_STEPS = 50_000
MAX_NAMES = 16


@dataclass(frozen=True)
class Shape:
    """What is certain about all values that fit a schema."""

    types: frozenset[str] = ALL
    values: tuple[object, ...] | None = None
    """The possible values as `key` returns them, in order; None: any value of the types."""
    required: frozenset[str] = frozenset()
    properties: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    closed: bool = False
    """True if an object may have no other properties."""

    def joined(self, other: Shape) -> Shape:
        """The shape of values that fit both."""
        values = self.values if other.values is None else other.values
        if self.values is not None and other.values is not None:
            values = tuple(v for v in self.values if v in other.values)
        names = self.properties.keys() | other.properties.keys()
        closed = (self.closed and not self.properties.keys() < names) or (
            other.closed and not other.properties.keys() < names
        )
        return Shape(
            self.types & other.types,
            values,
            self.required | other.required,
            {n: self.properties.get(n, ()) + other.properties.get(n, ()) for n in names},
            closed,
        )


def key(value: Any) -> object:
    """Equal for values that are equal in JSON, where 1 is 1.0 and not true."""
    if isinstance(value, list):
        return ("array", *map(key, value))
    if isinstance(value, dict):
        return ("object", frozenset((name, key(item)) for name, item in value.items()))
    return (type_of(value), value)


def type_of(value: Any) -> str:
    """One of `ALL`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "integer" if value == value // 1 else "fraction"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


class Prover:
    """Proofs about the schemas of one document, with a limit on the number of steps."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._steps = 0
        self._shapes: dict[Path, list[Shape] | None] = {}

    def is_disjoint(
        self,
        a: Path,
        b: Path,
        *,
        types: frozenset[str] = ALL,
        closes: bool = False,
        depth: int = 6,
    ) -> bool:
        """True if certainly no value fits both.

        types: consider only values of these types.
        closes: for `a`, consider only objects without properties that it does not name.
        """
        self._steps += 1
        if self._steps > MAX_STEPS or depth == 0:
            return False
        ours, theirs = self.shapes(a), self.shapes(b)
        if ours is None or theirs is None:
            return False
        if closes:
            ours = [replace(shape, closed=True) for shape in ours]
        return all(self._apart(one, other, types, depth) for one in ours for other in theirs)

    def are_told_apart(self, places: list[Path], types: frozenset[str]) -> bool:
        """True if all the schemas are disjoint because they list different values.

        The values may also be those of a property that all of them require.  This is a fast form of
        `is_disjoint` for many schemas.
        """
        shapes = [found[0] for found in map(self.shapes, places) if found and len(found) == 1]
        if len(shapes) < len(places):
            return False
        if _are_distinct([shape.values for shape in shapes]):
            return True
        if any(shape.types & types != {"object"} for shape in shapes):
            return False
        names = frozenset.intersection(*(shape.required for shape in shapes))
        return any(
            _are_distinct([self._listed(shape.properties.get(name, ())) for shape in shapes])
            for name in sorted(names)[:MAX_NAMES]
        )

    def _listed(self, places: tuple[Path, ...]) -> tuple[object, ...] | None:
        found = self.values(places[0]) if places else None
        return None if found is None else tuple(map(key, found))

    def _apart(self, a: Shape, b: Shape, types: frozenset[str], depth: int) -> bool:
        common = _types(a) & _types(b) & types
        if not common:
            return True
        if a.values is not None and b.values is not None:
            return not {v for v in {*a.values} & {*b.values} if _type(v) in common}
        return common == {"object"} and self._objects_apart(a, b, depth)

    def _objects_apart(self, a: Shape, b: Shape, depth: int) -> bool:
        for name in sorted(a.required | b.required):
            ours, theirs = a.properties.get(name, ()), b.properties.get(name, ())
            # a closed object that requires a property without naming it allows any value of it
            if (a.closed and not ours and name not in a.required) or (
                b.closed and not theirs and name not in b.required
            ):
                return True
            if any(self.is_disjoint(p, q, depth=depth - 1) for p in ours for q in theirs):
                return True
        return False

    def shapes(self, path: Path) -> list[Shape] | None:
        """The shapes of a schema's alternatives; None if there are too many."""
        if path not in self._shapes:
            self._shapes[path] = self._find_shapes(path, frozenset())
        return self._shapes[path]

    def _find_shapes(self, path: Path, seen: frozenset[Path]) -> list[Shape] | None:
        if path in seen:
            return [Shape()]
        seen, schema = seen | {path}, self._document.at(path)
        if isinstance(schema, bool):
            return [Shape()] if schema else []
        if not isinstance(schema, dict):
            return [Shape()]
        alternatives = [self._own(path, schema)]
        inner: list[list[Path]] = []
        if schema.get("$ref") is not None:
            inner.append([self._document.resolve(path, schema["$ref"])])
        for name in ("anyOf", "oneOf", "allOf"):
            if isinstance(branches := schema.get(name), list):
                places: list[Path] = [(*path, name, i) for i in range(len(branches))]
                inner += [[place] for place in places] if name == "allOf" else [places]
        for places in inner:
            found = [self._find_shapes(place, seen) for place in places]
            options = [shape for shapes in found if shapes is not None for shape in shapes]
            if None in found or len(alternatives) * len(options) > MAX_ALTERNATIVES:
                return None
            alternatives = [a.joined(b) for a in alternatives for b in options]
        return alternatives

    def _own(self, path: Path, schema: dict[str, Any]) -> Shape:
        values = schema.get("enum")
        values = [schema["const"]] if "const" in schema else values
        properties = schema.get("properties")
        required = schema.get("required")
        return Shape(
            declared(schema.get("type")),
            tuple(dict.fromkeys(map(key, values))) if isinstance(values, list) else None,
            frozenset(map(str, required)) if isinstance(required, list) else frozenset(),
            {n: ((*path, "properties", n),) for n in properties if isinstance(n, str)}
            if isinstance(properties, dict)
            else {},
            schema.get("additionalProperties") is False and not schema.get("patternProperties"),
        )

    def values(self, path: Path) -> list[Any] | None:
        """All values that fit a schema, in its order; None if it does not list them."""
        shapes = self.shapes(path)
        if shapes is None:
            return None
        found: dict[object, None] = {}
        for shape in shapes:
            if shape.values is None and not shape.types <= _FINITE:
                return None
            listed = _SIMPLE if shape.values is None else shape.values
            found |= dict.fromkeys(v for v in listed if _type(v) in shape.types)
        return [_value(v) for v in found]


_FINITE = frozenset(("null", "boolean"))
_SIMPLE = tuple(map(key, (None, False, True)))


def _are_distinct(lists: list[tuple[object, ...] | None]) -> bool:
    seen: set[object] = set()
    n = 0
    for values in lists:
        if values is None:
            return False
        seen.update(values)
        n += len(values)
    return len(seen) == n


def _value(v: object) -> Any:
    """The value that `key` made a key from."""
    assert isinstance(v, tuple)
    if v[0] == "array":
        return [_value(item) for item in v[1:]]
    if v[0] == "object":
        return {name: _value(item) for name, item in sorted(v[1], key=repr)}
    return v[1]


def _type(v: object) -> str:
    assert isinstance(v, tuple)
    return str(v[0])


def _types(shape: Shape) -> frozenset[str]:
    if shape.values is None:
        return shape.types
    return shape.types & frozenset(map(_type, shape.values))


def declared(types: Any) -> frozenset[str]:
    """The members of `ALL` that a ``type`` allows."""
    if types is None:
        return ALL
    names: Iterable[Any] = types if isinstance(types, list) else [types]
    found = set()
    for name in names:
        found |= {"integer", "fraction"} if name == "number" else {name} if name in ALL else set()
    return frozenset(found)
