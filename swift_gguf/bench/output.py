"""How benchmarks write down what they found: tables in Markdown, and a file of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swift_gguf.errors import SwiftError
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


def require_folder(path: Path | None) -> None:
    """To be called before a long measurement that ends in a file.

    Raises:
        SwiftError: the file's folder does not exist.
    """
    if path is not None and not path.parent.is_dir():
        raise SwiftError(f"there is no folder {path.parent} to write {path.name} to; make it first")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Raises OSError if it cannot be written."""
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
