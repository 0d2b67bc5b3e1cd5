"""The identity of a model file, to which profiles and sidecars are tied."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from swift_gguf.gguf import header as gguf_header

SAMPLES, SAMPLE_BYTES = 256, 4096  # of the weights


def fingerprint(path: Path) -> str:
    """A model's fingerprint: 32 hex digits, from the GGUF's header and its size.

    The weights are not read.  Models that differ only in their weights share a profile, which may
    cost speed but never changes a text.  For a split GGUF, the first part counts.

    Raises:
        ModelError: this is not a valid GGUF file.
    """
    length = gguf_header.read(path).length
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(length))
        digest.update(file.seek(0, os.SEEK_END).to_bytes(8, "little"))
    return digest.hexdigest()[:32]


def weights_digest(model: Path) -> str:
    """32 hex digits from evenly spread samples of the file; tells a fine-tune from its base."""
    size = model.stat().st_size
    digest = hashlib.sha256()
    with model.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def profile_key(model: Path, sidecar: Path | None) -> str:
    """The key of a model's profile: 32 hex digits.  A sidecar gives another key."""
    if sidecar is None:
        return fingerprint(model)
    both = fingerprint(model) + fingerprint(sidecar) + weights_digest(sidecar)
    return hashlib.sha256(both.encode()).hexdigest()[:32]
