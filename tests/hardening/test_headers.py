"""Headers that would make much memory of little file."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest

from swift_gguf.errors import ModelError
from swift_gguf.gguf import check as gguf_check
from swift_gguf.gguf import header as gguf_header

UINT8, STRING, ARRAY = 0, 8, 9


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(*, tensors: int, pairs: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


def many_keys(n: int) -> bytes:
    rest = b"".join(text(b"%x" % i) + struct.pack("<IB", UINT8, 0) for i in range(n))
    return header(tensors=0, pairs=n, rest=rest)


def many_tensors(n: int) -> bytes:
    rest = b"".join(text(b"%x" % i) + struct.pack("<IQIQ", 1, 1, 0, 32 * i) for i in range(n))
    return header(tensors=n, pairs=0, rest=rest + bytes(32 * n))


def many_tokens(n: int) -> bytes:
    strings = text(b"a") * n
    key = text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", ARRAY, STRING, n)
    return header(tensors=0, pairs=1, rest=key + strings)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (many_keys(300_000), "metadata keys"),
        (many_tensors(100_000), "tensors"),
        (many_tokens(2_500_000), "strings"),
    ],
    ids=["keys", "tensors", "tokens"],
)
def test_more_than_any_model_has_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "many.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=f"{what}, more than"):
            gguf_check.check(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(content) + (1 << 20)


def test_as_many_as_large_models_have_are_read(tmp_path: Path) -> None:
    path = tmp_path / "many.gguf"
    path.write_bytes(many_tokens(300_000))
    assert len(gguf_header.read(path).tokens) == 300_000
    path.write_bytes(many_tensors(50_000))
    assert len(gguf_header.read(path).tensors) == 50_000
