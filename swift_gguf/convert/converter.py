"""llama.cpp's converter: installed beside the library, from the same commit, with its gguf-py."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from swift_gguf.convert.checkpoint import Checkpoint
from swift_gguf.convert.quantized import require_readable
from swift_gguf.errors import ConvertError, NativeLibraryError
from swift_gguf.native.load import REINSTALL, built_folders

SCRIPT = "convert_hf_to_gguf.py"
PACKAGES = ("torch", "transformers", "safetensors", "sentencepiece")
INSTALL = "pip install 'swift-gguf[convert]'"


def find() -> Path:
    """The folder of the converter.

    Raises:
        NativeLibraryError: it is not installed.
    """
    folders = built_folders("converter")
    for folder in folders:
        if (folder / SCRIPT).is_file():
            return folder
    raise NativeLibraryError(f"llama.cpp's converter is not in {folders[-1]}; {REINSTALL}")


def require_packages() -> None:
    """Checks that the packages the converter imports are installed, without importing them.

    Raises:
        ConvertError: a package is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConvertError(f"converting needs {', '.join(missing)}; install them: {INSTALL}")


def architectures(converter: Path) -> frozenset[str]:
    """The names of architectures that the converter knows."""
    return frozenset(modules(converter))


def modules(converter: Path) -> Mapping[str, str]:
    """Maps each architecture to its module in the converter's package `conversion`.

    The map is parsed from the source: importing the package needs torch and takes seconds.
    """
    tree = ast.parse((converter / "conversion" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign) or ast.unparse(node.target) != "TEXT_MODEL_MAP":
            continue
        if node.value is not None:
            known: dict[str, str] = ast.literal_eval(node.value)
            return known
    raise NativeLibraryError(
        f"the converter in {converter} does not belong to this version; {REINSTALL}"
    )


def require_convertible(found: Checkpoint, converter: Path) -> None:
    """
    Raises:
        ConvertError: the converter cannot read its architecture or its quantised weights.
    """
    require_architecture(found.architecture, architectures(converter))
    if found.packing:
        require_readable(
            found.packing,
            found.name,
            sources=converter / "conversion",
            module=modules(converter)[found.architecture],
        )


def require_architecture(name: str, known: frozenset[str]) -> None:
    """
    Raises:
        ConvertError: the converter does not know it; the message lists the known ones.
    """
    if name in known:
        return
    near = difflib.get_close_matches(name, sorted(known), 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ConvertError(
        f"llama.cpp's converter does not know the architecture {name!r:.80}{hint}; it knows "
        + ", ".join(sorted(known))
    )
