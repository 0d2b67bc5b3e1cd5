"""JSON schemas by strangers: held, or refused in a line, and soon."""

from __future__ import annotations

import time
from typing import Any

import pytest

from swift_gguf.errors import GrammarError
from swift_gguf.schemas.constraint import json_by
from tests.fixtures.answering import END, small_vocabulary
from tests.unit.schemas.test_schemas import a, cat, either

VOCABULARY = small_vocabulary()


def nested(n: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


def linked(n: int, last: Any = None) -> Any:
    links = {str(i): {"properties": {"x": {"$ref": f"#/$defs/{i + 1}"}}} for i in range(n)}
    return {"$ref": "#/$defs/0", "$defs": {**links, str(n): last or {"type": "null"}}}


def product(n: int, m: int) -> Any:
    one = [
        [{"properties": {f"p{i}": {"const": j}}, "required": [f"p{i}"]} for j in range(m)]
        for i in range(n)
    ]
    return {"type": "object", "allOf": [{"anyOf": branches} for branches in one]}


def doubled(n: int) -> Any:
    twice = {str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(n)}
    return {"$ref": "#/$defs/0", "$defs": {**twice, str(n): a({"type": "string"})}}


HOSTILE: dict[str, Any] = {
    "deep": nested(30),
    "too deep": nested(200),
    "very deep": nested(900),
    "links": linked(700),
    "references to references": {
        "$ref": "#/$defs/0",
        "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(3000)}
        | {"3000": {"const": 1}},
    },
    "links to what is not supported": linked(700, {"pattern": "(("}),
    "a circle of references": {
        "$ref": "#/$defs/0",
        "$defs": {str(i): {"$ref": f"#/$defs/{(i + 1) % 3000}"} for i in range(3000)},
    },
    "repetitions": {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"},
    "repetitions of repetitions": {"type": "string", "pattern": "^((a{1,999}){1,999}){1,999}$"},
    "a long pattern": {"type": "string", "pattern": "^" + "a{2000}" * 9000 + "$"},
    "stars": {"type": "string", "pattern": "(a|aa|b)*" * 1000 + "c"},
    "behind": {"type": "string", "pattern": "^(.*a.{30}b)*$"},
    "brackets": {"type": "string", "pattern": "(" * 20_000},
    "a class": {"type": "string", "pattern": "[" + "a-z" * 20_000},
    "counts": {"type": "array", "items": {"type": "string", "minLength": 10**9}, "minItems": 10**9},
    "length and pattern": {"pattern": "^(ab|c)*$", "minLength": 10**4, "maxLength": 10**5},
    "enum": {"enum": [f"value {i}" for i in range(3000)]},
    "enum of objects": {"enum": [{"a": i, "b": [i]} for i in range(2000)]},
    "enum twice": {"allOf": [{"enum": [str(i) for i in range(2500)]}] * 2},
    "one of many": either(*[{"type": "object", "properties": {str(i): {}}} for i in range(1200)]),
    "one of many alike": either(*[cat(str(i), a=a({})) for i in range(250)]),
    "properties": {"type": "object", "properties": {f"p{i}": {} for i in range(2000)}},
    "required": {"type": "object", "required": [f"p{i}" for i in range(2000)]},
    "patterns of names": {
        "type": "object",
        "patternProperties": {f"^{i}_.*(a|b){{1,200}}$": {} for i in range(48)},
    },
    "products": product(10, 4),
    "products of many": product(20, 2),
    "doubled": doubled(30),
    "doubled, with siblings": {**doubled(25), "type": "object", "minProperties": 1},
    "both of two trees": {
        "$defs": {
            n: {"type": "object", "properties": {"c": {"$ref": f"#/$defs/{n}"}}} for n in "ab"
        },
        "allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
    },
    "a large multiple": {"type": "integer", "multipleOf": 999_999_937},
    "multiples": {"type": "integer", "allOf": [{"multipleOf": p} for p in (97, 89, 83, 79, 73)]},
    "long names": {"$ref": "#/$defs/" + "x" * 9000, "$defs": {"x" * 9000: a({"const": 1})}},
    "many branches that are not supported": {
        "type": "object",
        "properties": {
            f"p{i}": {"anyOf": [{"type": "number"}, {"pattern": "(?=a)"}]} for i in range(500)
        },
    },
    "many branches that llguidance cannot hold": {
        "type": "object",
        "properties": {f"p{i}": {"anyOf": [{"const": 1}, {"pattern": "[z"}]} for i in range(500)},
    },
    "lone surrogates": {"enum": ["\ud800"]},
    "numbers that are none": {"minimum": float("nan"), "maximum": float("inf")},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_take_no_time(name: str) -> None:
    """Held or refused in a line; and an answer may be begun, or is refused in a line."""
    start = time.process_time()
    told = ""
    try:
        begin(HOSTILE[name])
    except GrammarError as error:
        told = str(error)
    assert len(told.splitlines()) <= 1
    assert len(told) < 400
    assert time.process_time() - start < 4  # half of it on a quiet machine


def begin(schema: Any) -> None:
    matcher = VOCABULARY.matcher(json_by(schema))
    for _ in range(40):
        allowed = matcher.mask().nonzero()[0]
        token = int(allowed[len(allowed) // 2])
        if token >= END:
            break
        matcher.accept(token)
