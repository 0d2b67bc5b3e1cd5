"""The file of a context's state: what was written comes back, or nothing does."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest

from swift_gguf.errors import StateError
from swift_gguf.model.state import Saved, read, write

IDENTITY = {"model": "a" * 32, "n_ctx": 512, "flash_attn": None}
TOKENS = list(range(7, 27))
PIECES = [(8, b"keys and values"), (16, b"more"), (20, bytes(range(256)))]
NOTES = {"first": 2, "name": "Grüße"}


def written(**options: Any) -> bytes:
    file = io.BytesIO()
    n_bytes = write(file, IDENTITY, TOKENS, PIECES, notes=NOTES, **options)
    assert n_bytes == len(file.getvalue())
    return file.getvalue()


def contents(data: bytes, identity: dict[str, Any] = IDENTITY) -> Any:
    saved: Saved = read(io.BytesIO(data), identity)
    return saved.tokens, saved.notes, [(end, bytes(piece)) for end, piece in saved.pieces]


def test_what_was_written_comes_back() -> None:
    assert contents(written()) == (TOKENS, NOTES, PIECES)


@pytest.mark.parametrize("key", IDENTITY)
def test_a_state_of_something_else_is_refused(key: str) -> None:
    with pytest.raises(StateError, match=f"^another {key}$"):
        contents(written(), IDENTITY | {key: "other"})
    with pytest.raises(StateError, match="another"):
        contents(written(), {name: value for name, value in IDENTITY.items() if name != key})


def test_every_cut_and_every_addition_is_noticed() -> None:
    data = written()
    for n in range(len(data)):
        with pytest.raises(StateError):
            contents(data[:n])
    with pytest.raises(StateError, match="goes on"):
        contents(data + b"\0")


def test_every_damage_is_noticed_before_a_piece_is_handed_out() -> None:
    data, rng = written(), random.Random(1)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        seen: list[Any] = []
        with pytest.raises(StateError):
            seen.extend(read(io.BytesIO(bytes(damaged)), IDENTITY).pieces)
        assert [(end, bytes(piece)) for end, piece in seen] == PIECES[: len(seen)]
    for _ in range(500):  # parts that are moved, repeated or of another file
        damaged = bytearray(data)
        start, n = rng.randrange(len(data)), rng.randrange(1, 80)
        source = rng.randrange(len(data))
        damaged[start : start + n] = data[source : source + n]
        if bytes(damaged) != data:
            with pytest.raises(StateError):
                contents(bytes(damaged))


def test_no_more_is_written_than_the_limit() -> None:
    n_bytes = len(written())
    assert len(written(limit=n_bytes)) == n_bytes
    file = io.BytesIO()
    with pytest.raises(StateError, match="larger than 0 MiB"):
        write(file, IDENTITY, TOKENS, PIECES, notes=NOTES, limit=n_bytes - 1)
    assert len(file.getvalue()) < n_bytes
