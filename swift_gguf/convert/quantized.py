"""Checkpoints with quantised weights, and which of them llama.cpp's converter can read.

The supported methods are parsed from the converter's source: the values that `quant_method` and
`quant_format` are compared with in `ModelBase.dequant_model`.  An architecture with its own
`dequant_model` supports more.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_gguf.errors import ConvertError

# Files of tools that did not describe the quantisation in config.json.
_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
_GPTQ_BITS = (2, 4, 8)  # the converter does not implement 3 bits


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How the weights of a checkpoint are quantised."""

    method: str
    """transformers' name (``fp8``, ``gptq``), or the tool's name if config.json has none."""
    format: str | None = None
    """The format within ``compressed-tensors``."""
    bits: int | None = None
    """Bits per weight, if several weights share one number."""

    def __str__(self) -> str:
        details = [self.format, f"{self.bits} bits" if self.bits else None]
        return ", ".join([self.method, *filter(None, details)])


def packing(config: Mapping[str, Any], there: Collection[str]) -> Packing | None:
    """How the checkpoint is quantised; None if it is not.

    config: from `checkpoint.text_config`.
    there: names of all files of the checkpoint.
    """
    found = config.get("quantization_config")
    found = found if isinstance(found, dict) else {}
    bits = found.get("bits")
    if isinstance(found.get("quant_method"), str):
        groups = found.get("config_groups")
        if isinstance(groups, dict) and len(groups) == 1:
            (group,) = groups.values()
            weights = group.get("weights") if isinstance(group, dict) else None
            bits = weights.get("num_bits") if isinstance(weights, dict) else bits
        kind = found.get("format")
        return Packing(
            method=found["quant_method"],
            format=kind if isinstance(kind, str) else None,
            bits=bits if isinstance(bits, int) else None,
        )
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return Packing(method="bitsandbytes")
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and "bits" in mlx and "group_size" in mlx:
        return Packing(method="MLX")
    return next((Packing(method=tool) for file, tool in _FILES.items() if file in there), None)


def require_readable(found: Packing, name: str, *, sources: Path, module: str) -> None:
    """
    name: the checkpoint's, for the message.
    sources: the folder of the converter's modules; module: the name of the architecture's module.

    Raises:
        ConvertError: the converter cannot read weights quantised like this.
    """
    base = ast.parse((sources / "base.py").read_text(encoding="utf-8"))
    everywhere = next(
        node
        for node in ast.walk(base)
        if isinstance(node, ast.FunctionDef) and node.name == "dequant_model"
    )
    own = "def dequant_model(" in (sources / f"{module}.py").read_text(encoding="utf-8")
    methods = set(_compared("quant_method", base if own else everywhere))
    formats = set(_compared("quant_format", everywhere))
    is_read = found.method in methods
    if found.method == "compressed-tensors" and not own:
        is_read = found.format in formats
    if found.method == "gptq":
        is_read = found.bits in _GPTQ_BITS
    if not is_read:
        raise ConvertError(
            f"the weights of {name} are quantised ({found}), and llama.cpp's converter cannot "
            "read this format; use the original 16-bit model, which the model card names"
        )


def _compared(name: str, tree: ast.AST) -> Iterator[str]:
    """The strings that the variable `name` is compared with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == name:
            for other in node.comparators:
                if isinstance(other, ast.Constant) and isinstance(other.value, str):
                    yield other.value
