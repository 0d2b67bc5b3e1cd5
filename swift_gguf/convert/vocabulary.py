"""Compares the tokens of a checkpoint's tokenizer with the rows of its embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swift_gguf.errors import ConvertError


def require_embeddings(
    folder: Path, n_rows: int | None, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """
    n_rows: rows of the embeddings; None if unknown.
    tokenizer, settings: tokenizer.json and tokenizer_config.json, empty if missing.

    Raises:
        ConvertError: a token has no embedding.
    """
    ids = _ids(tokenizer) | _added(settings)
    beyond = {text: token for text, token in ids.items() if n_rows and token >= n_rows}
    if not beyond:
        return
    first = min(beyond, key=lambda text: beyond[text])
    raise ConvertError(
        f"{folder}: the embeddings have {n_rows} rows, and the tokenizer has {len(beyond)} tokens "
        f"beyond them ({first!r:.60}, id {beyond[first]}); remove the tokens that were added, or "
        "save the model after resize_token_embeddings"
    )


def _ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """The ids in tokenizer.json, if it has the usual structure."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        ids |= {text: token for text, token in vocabulary.items() if isinstance(token, int)}
    elif isinstance(vocabulary, list):  # with a score each
        ids |= {str(row[0]): i for i, row in enumerate(vocabulary) if isinstance(row, list) and row}
    added = tokenizer.get("added_tokens")
    for row in added if isinstance(added, list) else []:
        if isinstance(row, dict) and isinstance(row.get("id"), int):
            ids[str(row.get("content"))] = row["id"]
    return ids


def _added(settings: Mapping[str, Any]) -> dict[str, int]:
    """The ids of the tokens that tokenizer_config.json adds."""
    rows = settings.get("added_tokens_decoder")
    return {
        str(row.get("content")): int(token)
        for token, row in (rows.items() if isinstance(rows, dict) else ())
        if isinstance(row, dict) and token.isdecimal()
    }
