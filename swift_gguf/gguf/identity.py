"""Which model a file holds: what profiles and sidecars are tied to."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from swift_gguf.gguf import header as gguf_header

SAMPLES, SAMPLE_BYTES = 256, 4096  # of the weights


def fingerprint(path: Path) -> str:
    """32 hex digits that tell one model from another: of the GGUF's header and its size.

    The weights are not read.  Models that differ in nothing but their weights share a profile; that
    may cost speed, never text.  Of a split GGUF the first part counts.

    Raises:
        ModelError: this is no sound GGUF file.
    """
    length = gguf_header.read(path).length
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(length))
        digest.update(file.seek(0, os.SEEK_END).to_bytes(8, "little"))
    return digest.hexdigest()[:32]


def weights_digest(model: Path) -> str:
    """32 hex digits of pieces of the file, evenly spread: a fine-tuned model is not its base."""
    size = model.stat().st_size
    digest = hashlib.sha256()
    with model.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def profile_key(model: Path, sidecar: Path | None) -> str:
    """What a model's profile goes by: 32 hex digits, others with a sidecar than without."""
    if sidecar is None:
        return fingerprint(model)
    both = fingerprint(model) + fingerprint(sidecar) + weights_digest(sidecar)
    return hashlib.sha256(both.encode()).hexdigest()[:32]
