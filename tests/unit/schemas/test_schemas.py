"""What schemas hold answers to, and how what is not supported is told."""
# ruff: noqa: E501 - tables are read by line

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from swift_gguf.errors import GrammarError, SchemaError
from swift_gguf.schemas.constraint import (
    MAX_LENGTH,
    Tool,
    answer_or_calls,
    arguments_of,
    call_of,
    json_by,
)
from swift_gguf.schemas.matching import Vocabulary
from tests.fixtures.answering import END, PIECES, fits, small_vocabulary

VOCABULARY = small_vocabulary()
LOOK_AHEAD = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/Node"}},
    "required": ["value"],
}


def a(schema: Any, **more: Any) -> dict[str, Any]:
    """An object with one property, as most schemas are met."""
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], **more}


def either(*schemas: Any, **more: Any) -> dict[str, Any]:
    return {"oneOf": list(schemas), **more}


def cat(name: str, **more: Any) -> dict[str, Any]:
    kind = {"const": name}
    return {
        "type": "object",
        "properties": {"kind": kind, **more},
        "required": ["kind", *more],
    }


HELD: dict[str, tuple[Any, list[str], list[str]]] = {
    "a required name of a pattern": (
        {"type": "object", "patternProperties": {"^a": {"const": 1}}, "additionalProperties": False, "required": ["a"]},
        ['{"a":1}', '{"a":1,"ab":1}'], ["{}", '{"a":2}', '{"ab":1}', '{"b":1}'],
    ),
    # siblings of a list of types, of references and of unions
    "types and enum": ({"type": ["string", "null"], "enum": ["red", None]}, ['"red"', "null"], ['"x"']),
    "types and object": (
        {"type": ["object", "null"], "properties": {"a": {"type": "null"}}, "required": ["a"]},
        ['{"a":null}', "null"], ["{}", '{"b":1}'],
    ),
    "types and items": (
        {"type": ["array", "null"], "items": {"type": "integer"}, "maxItems": 2},
        ["[1,2]", "null"], ["[1,2,3]", '["a"]'],
    ),
    "types and length": ({"type": ["string", "null"], "maxLength": 3}, ['"abc"'], ['"abcd"', "1"]),
    "a list of one type": ({"type": ["object"], "properties": {"a": {"type": "null"}}}, ['{"a":null}'], ["[]"]),
    "reference and sibling": (
        {"$ref": "#/$defs/E", "minLength": 2, "$defs": {"E": {"type": "string"}}}, ['"ab"'], ['"a"']),
    "all of one": ({"allOf": [{"$ref": "#/$defs/E"}], "$defs": {"E": {"enum": ["a"]}}}, ['"a"'], ["{}"]),
    "all of two": (
        {"allOf": [a({"type": "null"}), {"properties": {"b": {"const": 1}}, "required": ["b"]}]},
        ['{"a":null,"b":1}', '{"a":null,"b":1,"c":0}'], ['{"a":null}', '{"b":1}'],
    ),
    "any of, beside properties": (
        {"properties": {"a": {"const": 1}, "b": {"const": 2}}, "type": "object",
         "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        ['{"a":1}', '{"b":2}', '{"a":1,"b":2}'], ["{}"],
    ),
    # numbers
    "whole numbers": ({"type": "integer", "minimum": 1, "maximum": 5}, ["1", "5"], ["0", "6", "1.5"]),
    "exclusive": ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 3}, ["2"], ["1", "3"]),
    "exclusive, draft 4": ({"type": "integer", "minimum": 1, "exclusiveMinimum": True}, ["2"], ["1"]),
    "exclusive fractions, draft 4": (
        {"type": "number", "maximum": 1.5, "exclusiveMaximum": True, "minimum": 1, "exclusiveMinimum": False}, ["1", "1.2"], ["1.5"]),
    "fractions": ({"type": "number", "minimum": 0.5, "maximum": 1}, ["0.5", "0.75", "1"], ["0.4", "1.1"]),
    "above a whole number": (
        {"type": "number", "exclusiveMinimum": 2, "maximum": 2.5}, ["2.5", "2.0001"], ["2", "2.0", "2.00"]),
    "between": ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, ["0.1"], ["0", "1", "-0.0", "1.0"]),
    "multiples": ({"type": "integer", "multipleOf": 3}, ["0", "-3", "12"], ["1", "13"]),
    "hundredths": ({"type": "number", "multipleOf": 0.01}, ["0.07"], ["0.075"]),
    "64 bits": (
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        [str(2**62), str(-(2**62))], [str(2**63)],
    ),
    "largest number": ({"type": "number", "maximum": 1.7976931348623157e308}, ["1.5"], ["null"]),
    "smallest number": ({"type": "number", "minimum": 5e-324}, ["1.5"], ["0"]),
    # texts
    "digits": ({"type": "string", "pattern": r"^\d{3}$"}, ['"123"'], ['"12"', '"1234"', '"abc"']),
    "anywhere": ({"type": "string", "pattern": r"\w"}, ['"- a"'], ['"--"']),
    "slash": ({"type": "string", "pattern": r"^\/\.$"}, ['"/."'], ['"/a"']),
    "group": ({"type": "string", "pattern": "^(?:a|b)$"}, ['"a"'], ['"c"']),
    "a point is no quote": ({"type": "string", "pattern": "^a.b$"}, [r'"a\"b"', '"aéb"'], ['"a"b"', '"ab"']),
    "quotes": ({"type": "string", "pattern": '^"a"$'}, [r'"\"a\""'], ['""a""', '"a"']),
    "one of two": ({"type": "string", "pattern": "^a$|^b$"}, ['"a"', '"b"'], ['"a$"', '"a', '"ab"']),
    "a backslash": ({"type": "string", "pattern": r"^a\\b$"}, [r'"a\\b"'], [r'"a\b"']),
    "a bracket that nothing opened": ({"type": "string", "pattern": "^a]}$"}, ['"a]}"'], ['"a"']),
    "pattern and length": ({"type": "string", "pattern": "^a+$", "maxLength": 3}, ['"aaa"'], ['"aaaa"', '"b"']),
    "nothing but a length": ({"maxLength": 1}, ['"a"', "12", "[1]", "null"], ['"ab"']),
    "long": ({"type": "string", "minLength": 2, "maxLength": 10**4}, [json.dumps("x" * 2000)], ['"a"']),
    "any number of characters": ({"type": "string", "maxLength": 10**30}, ['"a"'], ["1"]),
    "a format and a pattern": (
        {"type": "string", "format": "date", "pattern": "^2"}, ['"2024-02-29"'], ['"1999-01-01"', '"2023-02-29"']),
    "email": ({"type": "string", "format": "email"}, ['"a@b.de"'], ['"a"']),
    "date": ({"format": "date"}, ['"1900-02-28"', "1"], ['"1900-02-29"', '"0000-01-01"', '"2024-13-01"']),
    "time": ({"type": "string", "format": "date-time"}, ['"2024-01-01T00:00:00Z"'], ['"2024-01-01"']),
    "uuid": ({"type": "string", "format": "uuid"}, [json.dumps("0" * 8 + "-0000" * 3 + "-" + "f" * 12)], ['"0"']),
    "a format that nobody knows": ({"type": "string", "format": "color"}, ['"red"'], ["1"]),
    # constants
    "whatever character": (
        {"enum": ["\n", "\t", "\\", '"', "😀", "C:\\temp", "<|im_end|>", "é漢\u2028", "/[a]-", "#", "%"]},
        [r'"\n"', r'"\\"', r'"\""', '"😀"', r'"C:\\temp"', '"<|im_end|>"', '"é漢\u2028"', '"/[a]-"'],
        ['"\n"', '"\\"', r'"C:\temp"', '""'],
    ),
    "control characters": ({"const": "\0\x1f\x7f"}, [r'"\u0000\u001f\u007f"'], ['""', '"\0\x1f\x7f"']),
    "names": (
        {"type": "object", "properties": {n: {"const": 1} for n in ('say "hi"', "\\", "😀", "")}},
        [r'{"say \"hi\"":1,"\\":1,"😀":1,"":1}', '{"":1}'], ['{"\\":1}', '{"x":1}'],
    ),
    "structures": ({"const": {"a": [1, 2.5, None]}}, ['{"a": [1, 2.5, null]}'], ["{}", '{"a":[1]}']),
    "enum of structures": ({"enum": [{"a": 1}, [1], True]}, ['{"a":1}', "[1]", "true"], ["1", "[]"]),
    "enum under a type": ({"type": "integer", "enum": [1, 2, "a"]}, ["1"], ['"a"', "3"]),
    # anything
    "true": (True, ["1", '"a"', "null", '{"a":[1,{}]}'], ["", "a"]),
    "nothing said": ({}, ["1", "[]", "{}"], [""]),
    "a field of any type": (a({"title": "A"}), ['{"a":1}', '{"a":{"b":[]}}'], ["{}"]),
    "only a default": (a({"default": None}), ['{"a":1}'], ["{}"]),
    "items of any type": (a({"items": True, "type": "array"}), ['{"a":[1,"b"]}'], ['{"a":1}']),
    "null for absent": (
        {"type": "object", "properties": None, "required": None, "enum": None}, ["{}", '{"a":1}'], ["[]"]),
    # objects
    "closed, where nothing is said": (a({"const": 1}), ['{"a":1}'], ['{"a":1,"b":2}']),
    "open, where that is said": (
        a({"const": 1}, additionalProperties=True), ['{"a":1,"b":2}'], ['{"a":1,"a":2}', '{"b":1}']),
    "one spelling for a name": (a({"const": 1}, additionalProperties=True), [], [r'{"a":1,"\u0061":2}']),
    "free": ({"type": "object"}, ["{}", '{"a":{"b":1}}'], ["[]"]),
    "others by a schema": ({"type": "object", "additionalProperties": {"const": 1}}, ['{"x":1}'], ['{"x":2}']),
    "required without a property": ({"type": "object", "required": ["z"]}, ['{"z":1}'], ["{}"]),
    "required, none other": (
        {"type": "object", "properties": {}, "required": ["z"]}, ['{"z":1}'], ["{}", '{"z":1,"y":1}']),
    "a property that may not be": (
        {"type": "object", "properties": {"a": False, "b": {"const": 1}}}, ['{"b":1}', "{}"], ['{"a":1}']),
    "names by pattern": (
        {"type": "object", "patternProperties": {r"^\d$": {"const": 1}}, "additionalProperties": False},
        ['{"1":1}', "{}"], ['{"1":2}', '{"a":1}'],
    ),
    "names by enum": (
        {"type": "object", "propertyNames": {"$ref": "#/$defs/E"}, "additionalProperties": {"const": 1},
         "$defs": {"E": {"enum": ["x", "y"]}}},
        ['{"x":1}', "{}", '{"x":1,"y":1}'], ['{"z":1}', '{"x":2}'],
    ),
    "names of a form": (
        {"type": "object", "propertyNames": {"type": "string", "pattern": "^a"}}, ['{"ab":1}'], ['{"b":1}']),
    "names of a length": ({"type": "object", "propertyNames": {"maxLength": 1}}, ['{"a":1}'], ['{"ab":1}']),
    "not evaluated": (
        {"allOf": [a({"const": 1}), {"$ref": "#/$defs/B"}], "unevaluatedProperties": False,
         "$defs": {"B": {"properties": {"b": {"const": 2}}}}},
        ['{"a":1}', '{"a":1,"b":2}'], ['{"a":1,"c":1}'],
    ),
    "some properties": ({"type": "object", "minProperties": 1}, ['{"a":1}'], ["{}"]),
    "few properties": ({"type": "object", "maxProperties": 1}, ['{"a":1}', "{}"], ['{"a":1,"b":1}']),
    # arrays
    "some items": ({"type": "array", "minItems": 2}, ["[1,2]"], ["[1]"]),
    "tuple": (
        {"type": "array", "prefixItems": [{"type": "string"}], "items": {"type": "integer"}},
        ['["a",1]', "[]"], ['["a","b"]'],
    ),
    "tuple, draft 7": (
        {"type": "array", "items": [{"type": "string"}], "additionalItems": False}, ['["a"]'], ['["a",1]', "[1]"]),
    "additionalItems of no tuple": (
        {"type": "array", "prefixItems": [{"const": 1}], "additionalItems": False}, ["[1]"], ["[2]"]),
    "a set of few": (
        {"type": "array", "items": {"$ref": "#/$defs/E"}, "uniqueItems": True, "$defs": {"E": {"enum": ["x", 1]}}},
        ["[]", '["x",1]', '[1,"x"]'], ["[1,1]", '["x",1,1]'],
    ),
    "a set of booleans": (
        {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True}, ["[true,false]"], ["[true,true]"]),
    "a set of one": (
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "maxItems": 1}, ['["a"]'], ['["a","b"]']),
    "no set": ({"type": "array", "uniqueItems": False}, ["[1,1]"], ["1"]),
    # references
    "recursive": (
        {"$ref": "#/$defs/Node", "$defs": {"Node": NODE}},
        ['{"value":1}', '{"value":1,"next":{"value":2}}'], ["{}", '{"value":1,"next":1}'],
    ),
    "recursive, of an odd name": (
        {"$ref": "#/$defs/my.Node_int_", "$defs": {"my.Node_int_": a({"anyOf": [{"$ref": "#/$defs/my.Node_int_"}, {"const": 1}]})}},
        ['{"a":{"a":1}}'], ['{"a":2}'],
    ),
    "the root": (
        {"type": "object", "properties": {"a": {"$ref": "#"}}}, ['{"a":{"a":{}}}'], ['{"a":1}']),
    "mutual": (
        {"$ref": "#/$defs/A", "$defs": {"A": a({"anyOf": [{"$ref": "#/$defs/B"}, {"const": 1}]}), "B": {"type": "array", "items": {"$ref": "#/$defs/A"}}}},
        ['{"a":[{"a":1}]}'], ['{"a":[1]}'],
    ),
    "a chain": ({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"const": 1}}}, ["1"], ["2"]),
    "definitions": ({"$ref": "#/definitions/A", "definitions": {"A": {"const": 1}}}, ["1"], ["2"]),
    "a sibling": (
        {"type": "object", "properties": {"c": {"enum": ["x"]}, "d": {"$ref": "#/properties/c"}}},
        ['{"c":"x","d":"x"}'], ['{"d":"y"}'],
    ),
    "a number in a pointer": (
        {"properties": {"a": {"anyOf": [{"type": "null"}, {"const": 1}]}, "b": {"$ref": "#/properties/a/anyOf/1"}}},
        ['{"b":1}'], ['{"b":null}'],
    ),
    "escapes in a pointer": (
        {"properties": {"a": {"$ref": "#/$defs/x~1y"}, "b": {"$ref": "#/$defs/a%20~0b"}},
         "$defs": {"x/y": {"const": 1}, "a ~b": {"const": 2}}},
        ['{"a":1,"b":2}'], ['{"a":2}'],
    ),
    "an anchor": (
        {"properties": {"a": {"$ref": "#it"}}, "$defs": {"x": {"$anchor": "it", "const": 1}}}, ['{"a":1}'], ['{"a":2}']),
    "a document of its own": (
        {"$id": "https://example.org/a", "$ref": "b", "$defs": {"x": {"$id": "b", "$ref": "#/$defs/y", "$defs": {"y": {"const": 1}}}}},
        ["1"], ["2"],
    ),
    "an id that is no address": (
        {"$id": "urn:example:a", "$ref": "#/$defs/x", "$defs": {"x": {"const": 1}}}, ["1"], ["2"]),
    "the same name twice": (
        {"properties": {"item": {"enum": ["A"]}, "list": {"type": "array", "items": {"$ref": "#/$defs/item"}}},
         "$defs": {"item": {"enum": [5]}}},
        ['{"item":"A","list":[5]}'], ['{"list":["A"]}'],
    ),
    "names that end alike": (
        {"properties": {"a": {"$ref": "#/$defs/Item"}, "b": {"$ref": "#/definitions/Item"}},
         "$defs": {"Item": {"const": 1}}, "definitions": {"Item": {"const": 2}}},
        ['{"a":1,"b":2}'], ['{"a":2}', '{"b":1}'],
    ),
    "names of types": (
        {"properties": {n: {"$ref": f"#/$defs/{n}"} for n in ("string", "integer", "value", "space")},
         "$defs": {n: {"const": n} for n in ("string", "integer", "value", "space")}},
        ['{"string":"string","integer":"integer","value":"value","space":"space"}'], ['{"string":"a"}', '{"integer":1}'],
    ),
    # one of
    "one of two types": (either({"type": "string"}, {"type": "integer"}), ['"a"', "1"], ["1.5", "null"]),
    "one of constants": (either(*[{"const": i, "title": str(i)} for i in range(300)]), ["0", "299"], ["300"]),
    "told apart by a constant": (
        either({"$ref": "#/$defs/C"}, {"$ref": "#/$defs/D"}, discriminator={"propertyName": "kind"},
               **{"$defs": {"C": cat("c", claws={"type": "integer"}), "D": cat("d")}}),
        ['{"kind":"c","claws":1}', '{"kind":"d"}'], ['{"kind":"d","claws":1}', '{"kind":"e"}'],
    ),
    "told apart by what is required": (
        either(a({"type": "integer"}), {"type": "object", "properties": {"b": {}}, "required": ["b"]}),
        ['{"a":1}', '{"b":1}'], ['{"a":1,"b":1}', "{}"],
    ),
    "told apart beside properties": (
        {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"],
         "oneOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}, "required": ["b"]}]},
        ['{"kind":"x","a":1}', '{"kind":"x","b":1}'], ['{"kind":"x"}', '{"a":1}', '{"kind":"x","a":1,"b":1}'],
    ),
    "only what is required differs": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        ['{"a":1}', '{"b":1}'], ['{"a":1,"b":1}', "{}"],
    ),
    # what an answer can do without
    "a branch that is not supported": (
        {"anyOf": [{"type": "number"}, {"type": "string", "pattern": LOOK_AHEAD}]}, ["1.5"], ['"1.5"']),
    "such a branch behind a reference": (
        {"anyOf": [{"type": "number"}, {"$ref": "#/$defs/D"}], "$defs": {"D": {"type": "string", "pattern": LOOK_AHEAD}}},
        ["1.5"], ['"1.5"'],
    ),
    "a branch that llguidance cannot hold": (
        {"anyOf": [{"type": "number"}, {"type": "string", "pattern": "[z"}]}, ["1.5"], ['"1.5"']),
    "a branch that nothing fits": (
        {"anyOf": [{"type": "string", "minLength": 3, "maxLength": 2}, {"const": 1}]}, ["1"], ['"a"']),
    "an optional property that nothing fits": (
        {"type": "object", "properties": {"a": {"type": "string", "minLength": 3, "maxLength": 2}}}, ["{}"], ['{"a":"b"}']),
    "annotations": (
        {"title": "T", "description": "D", "x-more": {"not": {}}, "deprecated": True, "readOnly": True, "const": 1,
         "contentEncoding": "base64", "nullable": True, "$comment": "c", "examples": [{"$id": 1}]},
        ["1"], ["2"],
    ),
    "another draft": ({"$schema": "http://json-schema.org/draft-07/schema#", "type": "null"}, ["null"], ["1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_held(name: str) -> None:
    schema, fitting, others = HELD[name]
    constraint = json_by(schema)
    for text in fitting:
        assert fits(VOCABULARY, constraint, text), text
        json.loads(text)
    for text in others:
        assert not fits(VOCABULARY, constraint, text), text


REFUSED: dict[str, tuple[Any, str]] = {
    "set": (a({"type": "array", "items": {"type": "string"}, "uniqueItems": True}),
            "properties.a: uniqueItems is not supported; leave it out"),
    "a set of many": ({"type": "array", "items": {"enum": list(range(9))}, "uniqueItems": True},
                      "uniqueItems is not supported; leave it out"),
    "optional set": (a({"anyOf": [{"type": "array", "uniqueItems": True}, {"type": "null"}]}),
                     "properties.a.anyOf[0]: uniqueItems is not supported; leave it out"),
    "set in a union": ({"anyOf": [a({"type": "array", "uniqueItems": True}), {"type": "integer"}]},
                       "anyOf[0].properties.a: uniqueItems is not supported; leave it out"),
    "set in a definition": (
        {**a({"$ref": "#/$defs/T"}), "$defs": {"T": {"type": "array", "uniqueItems": True}}},
        "$defs.T: uniqueItems is not supported; leave it out"),
    "contains": (a({"contains": {}}), "properties.a: contains is not supported; leave it out"),
    "not": ({"not": {"type": "null"}}, "not is not supported; leave it out"),
    "if": ({"if": {"const": 1}, "then": {"minimum": 2}}, "if is not supported; leave it out"),
    "dependent": ({"items": {"dependentRequired": {"a": ["b"]}}},
                  "items: dependentRequired is not supported; leave it out"),
    "names beside others": (
        {"properties": {"a": {}}, "propertyNames": {"maxLength": 1}},
        "propertyNames is not supported beside other names; leave it out"),
    "not evaluated": ({"anyOf": [a({}), {}], "unevaluatedProperties": False},
                      "unevaluatedProperties is not supported; leave it out"),
    "look-ahead": (a({"type": "string", "pattern": "(?=a)b"}),
                   "properties.a: pattern is not supported (a look-around); leave it out"),
    "group": ({"pattern": r"(a)\1"}, "pattern is not supported (a reference to a group); leave it out"),
    "boundary": ({"pattern": r"\ba"}, "pattern is not supported (a word boundary); leave it out"),
    "no pattern": ({"properties": {"x y": {"items": {"pattern": "(("}}}},
                   "properties['x y'].items: pattern is not supported (unclosed group); leave it out"),
    "overlapping patterns": (
        {"type": "object", "patternProperties": {"^a": {}, "b$": {}}},
        "patternProperties is not supported (patternProperty regexes /^a/ and /b$/ are not disjoint); leave it out"),
    "number of properties": (
        {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "maxProperties": 2},
        "properties is not supported (min/maxProperties only supported when all keys listed in \"properties\" are required); leave it out"),
    "many properties": ({"type": "object", "minProperties": 2},
                        "minProperties is not supported: a name may occur twice"),
    "one of": (either({"type": "integer"}, {"type": "number"}),
               "oneOf is not supported: a value may fit both [0] and [1]; add a property with different const values, or use anyOf"),
    "large": ({"const": 2**60 + 1}, f"const is not supported: integers beyond {2**53} lose digits"),
    "elsewhere": (a({"$ref": "https://example.org/x.json"}),
                  "properties.a: $ref 'https://example.org/x.json' is another document; put it in $defs"),
    "a file": ({"$ref": "file:///etc/passwd"}, "$ref 'file:///etc/passwd' is another document; put it in $defs"),
    "nowhere": ({"$ref": "#/$defs/x"}, "$ref there is no '#/$defs/x'"),
    "no anchor": ({"$ref": "#x"}, "$ref there is no '#x'"),
    "lengths": (a({"type": "string", "minLength": 5, "maxLength": 2}),
                "properties.a: minLength allows no value"),
    "types": (a({"allOf": [{"type": "integer"}, {"type": "string"}]}),
              "properties.a: allOf allows no value"),
    "false": (False, "the schema allows no value"),
    "a required impossibility": (
        a({"type": "object", "properties": {"b": False}, "required": ["b"]}),
        "properties.a: properties allows no value"),
    "a required name that no pattern allows": (
        a({"type": "object", "patternProperties": {"^b$": {}}, "additionalProperties": False, "required": ["c"]}),
        "properties.a: additionalProperties allows no value"),
    "without end, by a pattern": (
        {"type": "object", "patternProperties": {"^a$": {"$ref": "#"}}, "additionalProperties": False, "required": ["a"]},
        "no value fits the schema: it would have to be endless"),
    "without end": (a({"$ref": "#"}), "no value fits the schema: it would have to be endless"),
    "without end, in an array": ({"type": "array", "items": {"$ref": "#"}, "minItems": 1},
                                 "no value fits the schema: it would have to be endless"),
    "itself": ({"$ref": "#"}, "$ref allows no value"),
    "empty enum": (a({"enum": []}), "properties.a: enum is empty"),
    "empty anyOf": ({"anyOf": []}, "anyOf is empty"),
    "a strange type": (a({"type": "strange"}), "properties.a: type must be a type of JSON, or a list of types"),
    "no type": ({"type": 3}, "type must be a type of JSON, or a list of types"),
    "no schema": (a(1), "properties.a must be an object, true or false"),
    "properties": ({"properties": []}, "properties must be an object of schemas"),
    "required": ({"required": [1]}, "required must be a list of names"),
    "a negative count": ({"minItems": -1}, "minItems must be a whole number, 0 or more"),
    "a count that is none": ({"maxLength": "3"}, "maxLength must be a whole number, 0 or more"),
    "a bound that is none": ({"minimum": "3"}, "minimum must be a number"),
    "multiples of nothing": ({"multipleOf": 0}, "multipleOf must be a number above 0"),
    "recursion with itself": (
        {"$ref": "#/$defs/A", "$defs": {"A": {"allOf": [{"$ref": "#/$defs/A"}, {"type": "object"}]}}},
        "$defs.A.allOf[0]: $ref is not supported (circular references with sibling keys are not supported: json-schema:///#/$defs/1); leave it out"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    schema, message = REFUSED[name]
    with pytest.raises(SchemaError) as refused:
        json_by(schema)
    assert str(refused.value) == message


def test_nothing_is_done_to_the_schema_that_is_given() -> None:
    for schema, *_ in HELD.values():
        before = json.dumps(schema)
        json_by(schema)
        assert json.dumps(schema) == before


# -- tools -----------------------------------------------------------------------------------------


def call(name: str, arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def test_each_tool_has_its_own_references() -> None:
    def tool(name: str, value: str) -> Tool:
        to = {"to": {"$ref": "#/$defs/P"}}
        return Tool(name, {"properties": to, "required": ["to"], "$defs": {"P": {"enum": [value]}}})

    both = call_of([tool("f", "x"), tool("g", "y")])
    for text, is_right in (
        (call("f", {"to": "x"}), True),
        (call("g", {"to": "y"}), True),
        (call("f", {"to": "y"}), False),
        (call("g", {}), False),
        (call("h", {"to": "x"}), False),
    ):
        assert fits(VOCABULARY, both, text) == is_right


PARAMETERS: dict[str, tuple[Any, Any]] = {
    "definitions": (a({"$ref": "#/definitions/P"}, definitions={"P": {"const": 1}}), {"a": 1}),
    "a sibling": ({"properties": {"c": {"const": 1}, "d": {"$ref": "#/properties/c"}}}, {"d": 1}),
    "the tool itself": ({"properties": {"c": {"$ref": "#"}}}, {"c": {"c": {}}}),
    "recursive": ({"$ref": "#/$defs/Node", "$defs": {"Node": NODE}}, {"value": 1}),
    "none": ({"type": "object", "properties": {}}, {}),
    "absent": (None, {}),
    "an object or null": ({"type": ["object", "null"]}, {"x": 1}),
    "a union": ({"anyOf": [{"type": "string"}, a({"const": 1})]}, {"a": 1}),
    "empty": ({}, {"x": 1}),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    parameters, arguments = PARAMETERS[name]
    other = Tool("other", a({"$ref": "#/$defs/P"}, **{"$defs": {"P": {"const": 2}}}))
    calls = call_of([other, Tool("f", parameters)])
    assert fits(VOCABULARY, calls, call("f", arguments))
    assert not fits(VOCABULARY, calls, call("f", 1))
    assert not fits(VOCABULARY, calls, call("f", "x"))
    assert not fits(VOCABULARY, calls, call("f", None))
    assert fits(VOCABULARY, arguments_of("f", parameters), json.dumps(arguments))


def test_a_tool_that_names_no_parameters_has_none() -> None:
    assert not fits(VOCABULARY, call_of([Tool("f", None)]), call("f", {"x": 1}))


@pytest.mark.parametrize("kind", ["string", ["string", "null"], "nonsense"])
def test_arguments_are_an_object(kind: Any) -> None:
    with pytest.raises(SchemaError, match=r"^f: type of the parameters must be object$"):
        call_of([Tool("f", {"type": kind})])


def test_the_tool_that_cannot_be_held_is_named() -> None:
    tags = {"properties": {"tags": {"type": "array", "uniqueItems": True}}}
    message = "^book: properties.tags: uniqueItems is not supported; leave it out$"
    makers: list[Callable[[], object]] = [
        lambda: call_of([Tool("look", {}), Tool("book", tags)]),
        lambda: arguments_of("book", tags),
        lambda: answer_or_calls({}, [Tool("book", tags)]),
    ]
    for make in makers:
        with pytest.raises(SchemaError, match=message):
            make()


def test_an_answer_or_calls() -> None:
    form = answer_or_calls(a({"const": 1}), [Tool("f", a({"const": 2}))])
    f = call("f", {"a": 2})
    for text, is_right in (
        ('{"a": 1}', True),
        (f"<tool_call>\n{f}\n</tool_call>", True),
        (f"<tool_call>{f}</tool_call>\n<tool_call>{f}</tool_call>", True),
        (f, False),
        ('{"a": 2}', False),
        (f"<tool_call>{call('f', {'a': 1})}</tool_call>", False),
        (f'{{"a": 1}}<tool_call>{f}</tool_call>', False),
        ("Well, ", False),
    ):
        assert fits(VOCABULARY, form, text) == is_right, text


# -- how it is written -----------------------------------------------------------------------------


def test_blanks_come_to_an_end() -> None:
    form = json_by({"type": "object", "properties": {"a": {"type": "array"}, "b": {}}})
    for text in (
        '{"a":[1,2],"b":1}',
        '{"a": [1, 2], "b": 1}',
        '{\n  "a": [\n\t1\n  ],\n  "b": 1\n}',
    ):
        assert fits(VOCABULARY, form, text), text
    for text in (
        ' {"a":[]}',
        '{"a":[]} ',
        '{\n\n"a":[]}',
        '{  "a":[]}',
        "{\n" + " " * 21 + '"a":[]}',
    ):
        assert not fits(VOCABULARY, form, text), text


# -- limits ----------------------------------------------------------------------------------------


def test_what_reaches_no_grammar_counts_for_nothing() -> None:
    long = "x" * 70_000
    json_by(a({"type": "string", "description": long, "examples": [long], "default": long}))
    json_by({**a({"type": "integer"}), "$defs": {"unused": {"enum": [long]}}})
    text = {"type": "string", "description": "x" * 900}
    call_of([Tool(f"t{i}", {"type": "object", "properties": {"a": text}}) for i in range(90)])
    with pytest.raises(SchemaError, match=f"too long: .* {MAX_LENGTH}"):
        json_by(a({"enum": [long]}))


# -- vocabularies ----------------------------------------------------------------------------------


def test_any_token_that_ends_answers_may_end_one_and_none_is_text() -> None:
    vocabulary = Vocabulary([*PIECES, b"<end>", b"", b"x"], [END, END + 2])
    matcher = vocabulary.matcher(json_by({"type": "string"}))
    matcher.accept(ord('"'))
    mask = matcher.mask()
    assert mask[ord("x")]
    assert not mask[[END, END + 1, END + 2]].any()
    matcher.accept(ord('"'))
    for _ in range(3):  # and whoever goes on after the end gets ends
        assert set(matcher.mask().nonzero()[0]) == {END, END + 2}
        matcher.accept(END + 2)


def test_without_an_end_the_answer_goes_on_as_long_as_it_fits() -> None:
    matcher = Vocabulary(PIECES, []).matcher(json_by({"const": 1}))
    matcher.accept(ord("1"))
    assert not matcher.mask().any()


def test_a_fork_goes_its_own_way() -> None:
    matcher = VOCABULARY.matcher(json_by({"enum": [12, 13]}))
    matcher.accept(ord("1"))
    fork = matcher.fork()
    fork.accept(ord("2"))
    assert matcher.mask()[ord("3")]
    with pytest.raises(GrammarError, match="does not fit"):
        matcher.accept(ord("x"))


def test_what_takes_too_much_while_sampling_is_told() -> None:
    form = json_by({"type": "string", "pattern": "^(ab|c)*$", "minLength": 10**4})
    matcher = VOCABULARY.matcher(form)
    matcher.accept(ord('"'))
    with pytest.raises(GrammarError, match="is too complex"):
        matcher.mask()
    matcher = VOCABULARY.matcher(json_by({"enum": [{"a": i} for i in range(2500)]}))
    assert matcher.mask()[ord("{")]
    with pytest.raises(GrammarError, match="is too complex"):
        matcher.accept(ord("{"))
