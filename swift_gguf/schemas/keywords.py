"""Keywords of JSON Schema whose value is not a schema, translated for llguidance."""

from __future__ import annotations

import math
from typing import Any

from swift_gguf.schemas.disjoint import ALL, type_of
from swift_gguf.schemas.document import Path, refused
from swift_gguf.schemas.patterns import to_rust

LARGEST_COUNT = 10**9
LARGEST_INTEGER = 2**63 - 1024
"""The largest double that fits llguidance's integers."""
EXCLUSIVE = {"exclusiveMinimum": ("minimum", 1), "exclusiveMaximum": ("maximum", -1)}
STEP = 1e-12
"""Relative distance from an exclusive bound of fractions to the inclusive one that replaces it.

llguidance itself would accept 2 as a number above 2 and below 2.5.
"""
LARGEST, SMALLEST = 1e16, 1e-15
"""Limits of bounds, because llguidance writes bounds out in digits."""


def as_list(path: Path, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise refused(path, name, "must be a list")
    return value


def _type(path: Path, name: str, value: Any, _: dict[str, Any]) -> Any:
    types = value if isinstance(value, list) else [value]
    if not types or any(t != "number" and (t not in ALL or t == "fraction") for t in types):
        raise refused(path, name, "must be a type of JSON, or a list of types")
    return list(dict.fromkeys(types)) if isinstance(value, list) else value


def _value(path: Path, name: str, value: Any, _: dict[str, Any]) -> Any:
    values = as_list(path, name, value) if name == "enum" else [value]
    if not values:
        raise refused(path, name, "is empty")
    if any(map(_is_inexact, values)):
        raise refused(path, name, f"is not supported: integers beyond {2**53} lose digits")
    return value


def _is_inexact(value: Any) -> bool:
    """True if a number changes as a double, which is how llguidance stores numbers."""
    if isinstance(value, (list, dict)):
        return any(map(_is_inexact, value.values() if isinstance(value, dict) else value))
    if isinstance(value, int) and abs(value) > 2**53:
        return abs(value) > LARGEST_INTEGER or int(float(value)) != value
    return False


def _count(path: Path, name: str, value: Any, _: dict[str, Any]) -> Any:
    if type_of(value) != "integer" or value < 0:
        raise refused(path, name, "must be a whole number, 0 or more")
    return min(int(value), LARGEST_COUNT) if name.startswith("max") else int(value)


def _bound(path: Path, name: str, value: Any, schema: dict[str, Any]) -> Any:
    """A bound as a double, rounded so that it never allows more."""
    if isinstance(value, bool) and name.startswith("exclusive"):
        return value  # draft 4
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refused(path, name, "must be a number")
    largest = LARGEST_INTEGER if is_whole(schema) else LARGEST
    sign = 1 if name in ("minimum", "exclusiveMinimum") else -1  # round up, or down
    inside = max(sign * value, -largest)
    if inside < 1e300:
        double = float(inside)
        inside = double if double >= inside else math.nextafter(double, math.inf)
        if 0 < inside < SMALLEST:
            inside = SMALLEST
    inside *= sign
    if abs(inside) <= LARGEST_INTEGER and inside == inside // 1:
        return int(inside)
    return inside


def is_whole(schema: dict[str, Any]) -> bool:
    """True if the schema allows only integers."""
    return schema.get("type") in ("integer", ["integer"])


def _multiple(path: Path, name: str, value: Any, _: dict[str, Any]) -> Any:
    if type_of(value) not in ("integer", "fraction") or value <= 0:
        raise refused(path, name, "must be a number above 0")
    return value


def pattern(path: Path, name: str, value: Any, _: dict[str, Any] | None = None) -> str:
    """The pattern in llguidance's dialect."""
    if not isinstance(value, str):
        raise refused(path, name, "must be a text")
    try:
        return to_rust(value)
    except ValueError as error:
        raise refused(path, name, f"is not supported ({error}); leave it out") from error


PLAIN = {
    "type": _type, "const": _value, "enum": _value, "multipleOf": _multiple, "pattern": pattern,
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _bound),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _count
    ),
}  # fmt: skip
