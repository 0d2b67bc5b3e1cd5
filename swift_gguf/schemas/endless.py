"""Detects schemas that no finite value fits, such as a node that must have a next node."""

from __future__ import annotations

from typing import Any

from swift_gguf.schemas.writing import Written


def can_end(written: Written) -> bool:
    """True if a finite value can fit; looks only at objects, arrays and references."""
    ending: set[str] = set()
    while True:
        found = {n for n, s in written.definitions.items() if n in ending or _ends(s, ending)}
        if found == ending:
            return _ends(written.schema, ending)
        ending = found


def _ends(schema: Any, ending: set[str]) -> bool:
    if not isinstance(schema, dict):
        return schema is not False
    if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in ending:
        return False
    if "anyOf" in schema and not any(_ends(branch, ending) for branch in schema["anyOf"]):
        return False
    if not all(_ends(part, ending) for part in schema.get("allOf", ())):
        return False
    if schema.get("type") == "object":
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        # llguidance decides which pattern a name matches; here it may be any of them
        unnamed = [*schema.get("patternProperties", {}).values(), others]
        return all(
            any(_ends(value, ending) for value in ([properties[n]] if n in properties else unnamed))
            for n in schema.get("required", ())
        )
    if schema.get("type") == "array" and (least := schema.get("minItems", 0)):
        first = schema.get("prefixItems", [])[:least]
        rest = [schema.get("items", True)] if least > len(first) else []
        return all(_ends(item, ending) for item in (*first, *rest) if not isinstance(item, list))
    return True
