"""Sidecars: a GGUF beside a model, with weights for its draft passes.

`swift-gguf prepare` writes ``model.swift.gguf`` beside ``model.gguf``.  For each FFN it has the
most important neurons, with down columns fitted to the output of the whole FFN.  It also has an
output head for the most used tokens, and copies of large attention matrices with fewer bits.  A
draft pass takes everything else from the model, including the KV cache.

Keys: ``swift.version``, ``swift.fingerprint`` and ``swift.weights`` (of the model, see
`identity`), ``swift.n_narrow`` ([n_layer], 0: that FFN is whole), ``swift.n_head``.
Tensors: ``blk.N.ffn_{up,gate,down}.{weight,bias}``, ``blk.N.attn_{q,k,v,qkv,output}.weight``,
``output.weight``, ``output.ids``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_gguf.errors import ModelError, SidecarError
from swift_gguf.gguf import header as gguf_header
from swift_gguf.gguf.identity import fingerprint, weights_digest

ARCHITECTURE = "swift-sidecar"
VERSION = 1
SUFFIX = ".swift.gguf"

PREPARE = "run swift-gguf prepare again"


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The contents of a sidecar, from its header."""

    path: Path
    n_narrow: tuple[int, ...]
    """[n_layer], number of neurons of each narrow FFN; 0: the layer has none."""
    n_head: int
    """Number of tokens of the draft head; 0: there is none."""

    @property
    def narrow_layers(self) -> frozenset[int]:
        return frozenset(layer for layer, n in enumerate(self.n_narrow) if n)


def path_beside(model: Path) -> Path:
    """The path of a model's sidecar: model.gguf -> model.swift.gguf."""
    return model.with_name(model.name.removesuffix(".gguf") + SUFFIX)


def identity(model: Path) -> dict[str, str]:
    """The keys that tie a sidecar to its model file."""
    return {"swift.fingerprint": fingerprint(model), "swift.weights": weights_digest(model)}


def read(path: Path, *, model: Path) -> Sidecar:
    """Reads the sidecar at `path` of the model file `model`.

    Raises:
        SidecarError: it is missing, damaged, of another version, or from another model.
    """
    try:
        header = gguf_header.read(path)
    except ModelError as error:
        raise SidecarError(f"no sidecar: {error}") from error
    data = header.metadata
    if header.architecture != ARCHITECTURE:
        raise SidecarError(
            f"{path} is not a sidecar but a {header.architecture or 'GGUF'}; {PREPARE}"
        )
    if data.get("swift.version") != VERSION:
        raise SidecarError(f"{path} has a version that this swift-gguf does not read; {PREPARE}")
    if any(data.get(key) != value for key, value in identity(model).items()):
        raise SidecarError(f"{path} was derived from another model than {model.name}; {PREPARE}")
    n_narrow, n_head = data.get("swift.n_narrow"), data.get("swift.n_head")
    if not (isinstance(n_narrow, gguf_header.Array) and isinstance(n_head, int)):
        raise SidecarError(f"{path} lacks a sidecar's metadata; {PREPARE}")
    widths = tuple(_width(item) for item in n_narrow.items)
    has = [f"blk.{layer}.ffn_down.weight" in header.tensors for layer in range(len(widths))]
    if has != [width > 0 for width in widths] or (n_head > 0) != ("output.ids" in header.tensors):
        raise SidecarError(f"{path} lacks tensors that its metadata names; {PREPARE}")
    return Sidecar(path=path, n_narrow=widths, n_head=n_head)


def _width(item: Any) -> int:
    return item if isinstance(item, int) and item > 0 else 0
