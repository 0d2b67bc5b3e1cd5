"""Checkpoints whose weights are quantised already, and which of them llama.cpp's converter reads.

What it reads is found in its source, as its architectures are: comparisons of `quant_method` and
`quant_format` in `ModelBase.dequant_model`, and more in architectures that have one of their own.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_gguf.errors import ConvertError

# Files of tools that did not write into config.json what they had done.
_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
_GPTQ_BITS = (2, 4, 8)  # of 3 the converter says that it is not implemented


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How the weights of a checkpoint were quantised."""

    method: str
    """In transformers' words (``fp8``, ``gptq``), or the tool's name where config.json has none."""
    format: str | None = None
    """Of ``compressed-tensors``."""
    bits: int | None = None
    """A weight, where several lie in one number."""

    def __str__(self) -> str:
        details = [self.format, f"{self.bits} bits" if self.bits else None]
        return ", ".join([self.method, *filter(None, details)])


def packing(config: Mapping[str, Any], there: Collection[str]) -> Packing | None:
    """What config.json says of quantisation; None: nothing.

    config: the language model's part of it over the whole, as the converter has it.
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
    name: of the checkpoint, for the message.
    sources: the converter's modules; module: that of the architecture.

    Raises:
        ConvertError: the converter does not read such weights of this architecture.
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
            f"the weights of {name} are quantised already ({found}), in a way that llama.cpp's "
            "converter does not read; take the model in 16 bits (the card of a quantised one names "
            "it)"
        )


def _compared(name: str, tree: ast.AST) -> Iterator[str]:
    """The texts that a variable is compared with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == name:
            for other in node.comparators:
                if isinstance(other, ast.Constant) and isinstance(other.value, str):
                    yield other.value
