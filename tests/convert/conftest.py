"""Checkpoints that are made once, and what is converted from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from swift_gguf.convert import checkpoint as checkpoints
from swift_gguf.convert.run import Conversion, ConvertOptions
from swift_gguf.hub import models
from tests.convert import checkpoints as made


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tokenizers(kind)`: a folder with its files; kinds as in `checkpoints.N_EMBD`."""
    root = tmp_path_factory.mktemp("tokenizers")

    def find(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            if kind.startswith("spm"):
                made.spm_tokenizer(folder, prefix=kind == "spm-prefix")
            else:
                name = {"bpe": "smollm2-135m", "qwen2": "qwen2.5-coder-1.5b"}[kind]
                made.bpe_tokenizer(folder, models.resolve(name), kind=kind)
        return folder

    return find


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tokenizers: Callable[[str], Path]
) -> Callable[..., Path]:
    """`checkpoint(family, ...)`: a tiny random checkpoint, made once for the same arguments."""
    root = tmp_path_factory.mktemp("checkpoints")
    known: dict[str, Path] = {}

    def make(family: str, **options: object) -> Path:
        key = f"{family}-{sorted(options.items(), key=str)}"
        if key not in known:
            folder = root / f"tiny-{len(known)}"
            reads = made.FAMILIES[family][1]
            known[key] = made.make(family, folder, tokenizer=tokenizers(reads), **options)  # type: ignore[arg-type]
        return known[key]

    return make


@pytest.fixture(scope="session")
def converted(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]
) -> Callable[..., Path]:
    """`converted(family, outtype=...)`: the GGUF of a tiny checkpoint, made once."""
    root = tmp_path_factory.mktemp("converted")
    known: dict[str, Path] = {}

    def make(family: str, outtype: str = "f32") -> Path:
        key = f"{family}-{outtype}"
        if key not in known:
            known[key] = convert(checkpoint(family), root / f"{key}.gguf", outtype=outtype)
        return known[key]

    return make


def convert(folder: Path, out: Path, **options: object) -> Path:
    """Converts a folder, with `ConvertOptions`."""
    found = checkpoints.read(folder)
    # llama.cpp expects Phi's own tokens of a model with "phi3" in its name
    with Conversion(found, out, ConvertOptions(name="tiny", **options)) as conversion:  # type: ignore[arg-type]
        conversion.run()
        conversion.finish({})
        conversion.forget()
    return out
