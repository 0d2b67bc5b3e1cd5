"""Files that say nothing, or too much, about the token that ends a text."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from swift_gguf.gguf.end_token import EOS_KEY, end_token, overrides
from swift_gguf.gguf.header import Header
from swift_gguf.llama import Llama
from swift_gguf.model.model import Model
from swift_gguf.native.binding import library
from swift_gguf.text.text import encode
from tests.fixtures.tiny_gguf import VOCAB, write_tiny

COMMA = 11


@pytest.fixture
def without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gguf.GGUFWriter, "add_eos_token_id", lambda *_: None)
    return write_tiny(tmp_path / "endless.gguf", "llama")


@pytest.fixture
def with_added_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    add = gguf.GGUFWriter.add_pad_token_id

    def and_more(writer: gguf.GGUFWriter, token: int) -> None:
        add(writer, token)
        writer.add_add_eos_token(True)

    monkeypatch.setattr(gguf.GGUFWriter, "add_pad_token_id", and_more)
    return write_tiny(tmp_path / "ended.gguf", "llama")


def test_the_templates_end_is_the_end(
    without_end: Path, open_model: Callable[..., Model], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="swift_gguf"):
        model = open_model(without_end)
    assert [message for message in caplog.messages if "answers end at <|im_end|>" in message]
    assert model.is_eog(VOCAB.im_end)
    assert not model.is_eog(COMMA)


def test_the_drop_in_agrees(without_end: Path) -> None:
    llama = Llama(str(without_end), n_gpu_layers=0, verbose=False)
    assert llama.token_eos() == VOCAB.im_end
    assert not library().api.llama_vocab_is_eog(llama._model.vocab, COMMA)
    llama.close()


def test_an_end_that_the_tokenizer_adds_ends_no_prompt(
    with_added_end: Path, open_model: Callable[..., Model]
) -> None:
    model = open_model(with_added_end)
    assert library().tokenize(model.vocab, b"Hello", add_special=True, parse_special=True)[-1] == (
        VOCAB.im_end
    ), "the file means nothing"
    assert VOCAB.im_end not in encode(model, "Hello")
    assert encode(model, "Hello<|im_end|>").count(VOCAB.im_end) == 1, "it was said"


TOKENS = [b"%d" % i for i in range(11)] + [b",", b"<|endoftext|>", b"<|im_end|>"]


def header(**more: Any) -> Header:
    keys = {"model": "gpt2"} | more
    made = Header(metadata={f"tokenizer.{_key(key)}": value for key, value in keys.items()})
    made.tokens.extend(TOKENS)
    return made


def _key(key: str) -> str:
    return key if key == "chat_template" else f"ggml.{key}"


@pytest.mark.parametrize(
    ("made", "token"),
    [
        (header(), 13),
        (header(chat_template="{{ m }}<|endoftext|>"), 12),
        (header(chat_template="{{ m }}<|im_end|>"), 13),
        (header(eos_token_id=12), None),
        (header(eos_token_id=99), 13),  # llama.cpp takes its default then, too
        (header(model="llama"), None),
    ],
)
def test_which_token(made: Header, token: int | None) -> None:
    assert end_token(made) == token
    assert overrides(made, "m.gguf") == ({} if token is None else {EOS_KEY: token})


def test_nothing_better_is_known(caplog: pytest.LogCaptureFixture) -> None:
    made = header()
    made.tokens[12:] = [b"a", b"b"]
    with caplog.at_level(logging.WARNING, logger="swift_gguf"):
        assert overrides(made, "m.gguf") == {}
    assert "answers end at ','" in caplog.text


def test_the_default_is_right(caplog: pytest.LogCaptureFixture) -> None:
    made = header()
    made.tokens[11] = b"<|endoftext|>"  # Falcon's
    assert overrides(made, "m.gguf") == {}
    assert not caplog.messages
