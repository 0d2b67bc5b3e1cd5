"""How experiments write down what they found: tables in Markdown, and a file of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swift_gguf.subnetwork import SubNetwork, format_layers


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column to the left, the others to the right."""
    rule = [":--", *["--:"] * (len(headers) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headers, rule, *rows])


def layers(subnetwork: SubNetwork) -> dict[str, str]:
    """A sub-network in JSON, as profiles have it."""
    return {
        "skip_attn": format_layers(subnetwork.skip_attn),
        "skip_ffn": format_layers(subnetwork.skip_ffn),
    }


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Raises OSError if it cannot be written."""
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
