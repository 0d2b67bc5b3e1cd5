"""Whatever schema is held: each answer that comes to its end fits it, as `jsonschema` judges.

Answers are drawn from chance at temperature 1.5 (`Chance`), so what a model would never say is said.
"""
# ruff: noqa: E501, UP007, UP045 - strategies by line; unions as people write them

from __future__ import annotations

import datetime
import decimal
import enum
import json
import re
import uuid
from typing import Annotated, Any, Generic, Literal, Optional, TypeVar, Union

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, conlist

from swift_gguf.errors import SchemaError
from swift_gguf.schemas.constraint import Tool, answer_or_calls, call_of, json_by
from tests.fixtures.answering import END, PIECES, Chance, small_vocabulary
from tests.unit.schemas.test_schemas import HELD

VOCABULARY = small_vocabulary()
ENDS = [END, END + 2]
ALL_PIECES = [*PIECES, b"<end>", b"", b"</s>"]
FORMATS = jsonschema.FormatChecker(["date", "ipv4", "ipv6", "uuid"])


def answers(schema: Any, *, seed: int, n: int, max_tokens: int = 300) -> list[Any]:
    """Finished answers, each judged."""
    constraint, chance = json_by(schema), Chance(ALL_PIECES, ENDS, seed=seed)
    judge = judge_of(schema)
    found = []
    for _ in range(n):
        text = chance.answer(VOCABULARY, constraint, max_tokens=max_tokens)
        if text is not None:
            found.append(json.loads(text))
            judge.validate(found[-1])
    return found


def judge_of(schema: Any) -> Any:
    kind = jsonschema.Draft202012Validator
    text = json.dumps(schema)
    if '"additionalItems"' in text and '"prefixItems"' not in text:
        kind = jsonschema.Draft7Validator
    if re.search(r'"exclusiveM[a-z]+": (true|false)', text):
        kind = jsonschema.Draft4Validator
    return kind(_without_nulls(schema), format_checker=FORMATS)


def _without_nulls(schema: Any) -> Any:
    """Keywords that are null are as if absent, which `jsonschema` does not know."""
    if not isinstance(schema, dict):
        return schema
    return {key: value for key, value in schema.items() if value is not None or key == "const"}


@pytest.mark.parametrize("name", HELD)
def test_every_kind(name: str) -> None:
    found = answers(HELD[name][0], seed=1, n=6)
    unlikely = {"a bracket that nothing opened", "long", "64 bits", "tuple, draft 7"}
    assert len(found) > 1 or name in unlikely


# -- Pydantic models -------------------------------------------------------------------------------


class Color(enum.Enum):
    RED = "red"
    NAVY = "navy blue"


class Size(enum.IntEnum):
    S = 1
    L = 3


class Plain(BaseModel):
    pass


class Point(BaseModel):
    """A point."""

    x: float
    y: float = Field(0, ge=-1, le=1, description="From -1 to 1")


class Nested(BaseModel):
    point: Point
    points: list[Point] = []
    named: dict[str, Point] = {}
    best: Optional[Point] = None
    colors: dict[Color, int]


class Node(BaseModel):
    value: int
    children: list[Node] = []
    other: Union[Node, None] = None


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=0, le=9)]


class Dog(BaseModel):
    kind: Literal["dog", "hound"] = "dog"
    good: bool


class Home(BaseModel):
    told_apart: Annotated[Union[Cat, Dog], Field(discriminator="kind")]
    not_told_apart: Union[Point, Cat, int, list[str], None]


class Odd(BaseModel):
    a: Literal["\n", ";", 'say "hi"', "😀", "C:\\temp", "", "<|im_end|>", "漢\u2028"]
    b: Literal[1, "1", True, None]
    alias: int = Field(alias='an "alias"\\')


class Bounded(BaseModel):
    code: Annotated[str, Field(pattern=r"^[A-Z]{2}\d{2,4}$")]
    short: Annotated[str, Field(min_length=1, max_length=5)]
    positive: Annotated[int, Field(gt=0)]
    share: Annotated[float, Field(ge=0, lt=1)]
    even: Annotated[int, Field(multiple_of=2, ge=-10, le=10)]
    some: conlist(int, min_length=1, max_length=3)  # type: ignore[valid-type]


class Times(BaseModel):
    day: datetime.date
    at: datetime.time
    then: datetime.datetime
    id: uuid.UUID


class Price(BaseModel):
    price: Annotated[decimal.Decimal, Field(ge=0, max_digits=5)]


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")

    anything: Any
    pair: tuple[int, str]
    many: tuple[int, ...] = ()
    raw: dict[str, Any] = {}
    listed: list[Any] = []
    flags: set[bool] = set()


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: Size
    color: Color | None = None


T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    items: list[T]
    next: int | None = None


MODELS = (
    Plain, Point, Nested, Node, Home, Odd, Bounded, Times, Price, Loose, Strict, Page[int], Page[Page[Cat]],
    list[Point], dict[str, int], dict[datetime.date, int], dict[uuid.UUID, bool], Union[Cat, Dog],
    Annotated[Union[Cat, Dog], Field(discriminator="kind")], Color, Literal["a", "b"], Optional[int],
    tuple[Color, Size], list[list[int]], dict[Literal["x", "y"], Point], datetime.timedelta, bytes,
)  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_pydantic(model: Any) -> None:
    adapter = TypeAdapter(model)
    schema = adapter.json_schema()
    found = answers(schema, seed=2, n=5, max_tokens=900)
    assert found
    if model in (datetime.timedelta, Price):  # what is too long for Python; any text, by the schema
        return
    for value in found:
        adapter.validate_json(json.dumps(value))


def test_tools_of_pydantic_models() -> None:
    models: list[Any] = [Nested, Node, Home, Odd, Strict, Plain]
    tools = [Tool(model.__name__, model.model_json_schema()) for model in models]
    chance = Chance(ALL_PIECES, ENDS, seed=3)
    calls, both = call_of(tools), answer_or_calls(Point.model_json_schema(), tools)
    n = 0
    for _ in range(20):
        text = chance.answer(VOCABULARY, calls, max_tokens=900)
        if text is not None:
            call = json.loads(text)
            (model,) = [model for model in models if model.__name__ == call["name"]]
            model.model_validate(call["arguments"])
            n += 1
        text = chance.answer(VOCABULARY, both, max_tokens=900)
        if text is not None and not text.startswith(b"<tool_call>"):
            Point.model_validate_json(text)
            n += 1
    assert n > 10


# -- generated schemas -----------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", 'c"', "d\\", "é", ""])
VALUES = st.sampled_from(
    [None, True, False, 0, 1, -3, 2.5, "", "a", 'q"', "\\", "\n", [], [1], {}, {"a": 1}]
)
PATTERNS = st.sampled_from(
    [r"^\d+$", "^a|b$", r"^[\w-]{1,4}$", "x.y", r"\s", "^(?:ab){0,2}$", r"^[^\W\d]+$"]
)
COUNT = st.integers(0, 4)


def optional(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keywords)


def scalar() -> st.SearchStrategy[Any]:
    texts = optional(
        minLength=COUNT,
        maxLength=COUNT,
        pattern=PATTERNS,
        format=st.sampled_from(["date", "uuid", "ipv4", "x"]),
    )
    whole = optional(
        minimum=st.integers(-20, 20), maximum=st.integers(-20, 20), multipleOf=st.integers(1, 5)
    )
    number = optional(exclusiveMinimum=st.floats(-9, 9), maximum=st.floats(-9, 9))
    return st.one_of(
        texts.map(lambda more: {"type": "string", **more}),
        whole.map(lambda more: {"type": "integer", **more}),
        number.map(lambda more: {"type": "number", **more}),
        st.sampled_from([True, {}, {"type": "null"}, {"type": "boolean"}]),
        st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
        VALUES.map(lambda value: {"const": value}),
        st.sampled_from(
            [{"$ref": "#/$defs/node"}, {"$ref": "#/$defs/text"}, {"$ref": "#/$defs/cat"}]
        ),
    )


def compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(NAMES, inner, max_size=4)
    objects = st.tuples(
        properties,
        st.lists(NAMES, max_size=2),
        optional(additionalProperties=inner | st.booleans(), maxProperties=COUNT),
    ).map(lambda t: {"type": "object", "properties": t[0], "required": t[1], **t[2]})
    arrays = optional(
        items=inner,
        prefixItems=st.lists(inner, max_size=2),
        minItems=COUNT,
        maxItems=COUNT,
        uniqueItems=st.booleans(),
    )
    branches = st.lists(inner, min_size=1, max_size=3)
    several = st.lists(
        st.sampled_from(["string", "integer", "null", "array", "object"]),
        min_size=1,
        max_size=3,
        unique=True,
    )
    return st.one_of(
        objects,
        arrays.map(lambda more: {"type": "array", **more}),
        branches.map(lambda b: {"anyOf": b}),
        branches.map(lambda b: {"oneOf": b}),
        branches.map(lambda b: {"allOf": b}),
        st.tuples(objects, branches).map(lambda t: {**t[0], "anyOf": t[1]}),
        st.tuples(objects, branches).map(lambda t: {**t[0], "oneOf": t[1]}),
        st.tuples(several, objects, arrays).map(lambda t: {**t[2], **t[1], "type": t[0]}),
        st.tuples(inner, st.sampled_from(["contains", "not", "propertyNames"])).map(
            lambda t: {t[1]: t[0]}
        ),
        NAMES.map(
            lambda name: {
                "type": "object",
                "patternProperties": {"^" + name[:1].replace("\\", "z"): {"type": "null"}},
            }
        ),
    )


DEFINITIONS = {
    "node": {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/node"}, "b": {"type": "integer"}},
    },
    "text": {"type": "string", "maxLength": 3},
    "cat": {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]},
}
SCHEMAS = st.recursive(scalar(), compound, max_leaves=8).map(
    lambda schema: {**schema, "$defs": DEFINITIONS} if isinstance(schema, dict) else schema
)
COUNTS = {"held": 0, "refused": 0, "answers": 0}


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(schema=SCHEMAS, seed=st.integers(0, 9))
def test_generated(schema: Any, seed: int) -> None:
    told = ""
    try:
        COUNTS["answers"] += len(answers(schema, seed=seed, n=2, max_tokens=200))
    except SchemaError as error:
        told = str(error)
    assert len(told.splitlines()) <= 1
    COUNTS["refused" if told else "held"] += 1


def test_many_of_the_generated_are_held() -> None:
    if sum(COUNTS.values()):  # with the test above
        assert COUNTS["held"] > 50
        assert COUNTS["answers"] > COUNTS["held"]


def test_the_judge_finds_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema that is held by another one: the comparisons above can fail."""
    held = json_by

    def loosely(schema: Any) -> Any:
        return held({key: value for key, value in schema.items() if key != "maximum"})

    monkeypatch.setattr(f"{__name__}.json_by", loosely)
    with pytest.raises(jsonschema.ValidationError):
        answers({"type": "integer", "minimum": 1, "maximum": 5}, seed=1, n=20)
