"""How long a context is, by what the file says and the user asks."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from swift_gguf.gguf.context_length import ContextLength, context_length
from swift_gguf.gguf.header import Header, Tensor

ROPE = ContextLength(trained=2048, limit=None)
SMALL = ContextLength(trained=200, limit=None)
TABLE = ContextLength(trained=200, limit=200)
UNKNOWN = ContextLength(trained=None, limit=None)


@pytest.mark.parametrize(
    ("length", "wanted", "n_ctx"),
    [
        (ROPE, None, 2048),
        (ROPE, 0, 2048),
        (ROPE, 100, 256),
        (ROPE, 8192, 8192),
        (ContextLength(trained=131072, limit=None), None, 4096),
        (SMALL, None, 256),  # llama.cpp makes no others
        (TABLE, None, 200),
        (TABLE, 0, 200),
        (TABLE, 100, 200),
        (TABLE, 257, 200),
        (TABLE, 4096, 200),
        (UNKNOWN, None, 4096),
        (UNKNOWN, 0, 512),
    ],
)
def test_what_is_chosen(length: ContextLength, wanted: int | None, n_ctx: int) -> None:
    assert length.choose(wanted) == n_ctx
    assert length.usable(n_ctx) == n_ctx


@pytest.mark.parametrize(
    ("length", "wanted", "says"),
    [
        (ROPE, None, ""),
        (ROPE, 0, ""),
        (ROPE, 2048, ""),
        (ROPE, 2049, "was trained for 2048 tokens"),
        (ContextLength(trained=2048, limit=None, scaled=True), 8192, ""),
        (TABLE, 200, ""),
        (TABLE, 201, "has 200 positions"),
        (UNKNOWN, 8192, ""),
    ],
)
def test_a_line_of_warning(
    length: ContextLength, wanted: int | None, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="swift_gguf"):
        length.warn(Path("m.gguf"), wanted)
    assert len(caplog.messages) == bool(says)
    assert says in "".join(caplog.messages)


def header(architecture: str, *, table: bool = False, scaling: str | None = None) -> Header:
    keys: dict[str, object] = {"context_length": 300}
    if scaling:
        keys["rope.scaling.type"] = scaling
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    made = Header(metadata={"general.architecture": architecture, **metadata})
    if table:
        made.tensors["position_embd.weight"] = Tensor((64, 300), 0)
    return made


def test_what_a_file_says() -> None:
    assert context_length(header("llama")) == ContextLength(trained=300, limit=None)
    assert context_length(header("mpt", table=True)).limit == 300
    assert context_length(header("mpt")).limit is None
    assert context_length(header("gpt2")).limit == 300, "the table is in another part of the file"
    scaled = header("llama", scaling="yarn")
    assert context_length(scaled).scaled
    assert context_length(Header()) == UNKNOWN
