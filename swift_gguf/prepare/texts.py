"""Calibration text, and the file that keeps it between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swift_gguf.gguf.identity import fingerprint, weights_digest


@dataclass(frozen=True, kw_only=True)
class Text:
    """A prompt and the model's answers, as token ids."""

    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


def texts_key(model: Path, prompts: Sequence[Sequence[int]], seed: int) -> str:
    """Identifies the model, the seed and the prompts: a run only continues texts with its key."""
    asked = json.dumps(
        [fingerprint(model), weights_digest(model), seed, [list(p) for p in prompts]]
    )
    return hashlib.sha256(asked.encode()).hexdigest()[:32]


def load_texts(path: Path, key: str) -> list[Text]:
    """The texts that `save_texts` wrote; empty if the file is damaged or has another key."""
    try:
        values = json.loads(path.read_text())
        if values["key"] != key:
            return []
        return [Text(prompt=_ids(prompt), answers=[*map(_ids, a)]) for prompt, a in values["texts"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _ids(values: Sequence[object]) -> list[int]:
    if not all(isinstance(value, int) for value in values):
        raise ValueError("token ids are whole numbers")
    return [value for value in values if isinstance(value, int)]


def save_texts(path: Path, key: str, texts: Sequence[Text]) -> None:
    """Saves the answers, so that an interrupted run can resume."""
    rows = [[list(text.prompt), [list(a) for a in text.answers]] for text in texts]
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps({"key": key, "texts": rows}))
        part.replace(path)
    except BaseException:  # a full disk, an interrupt
        part.unlink(missing_ok=True)
        raise
