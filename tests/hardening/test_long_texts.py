"""Texts without a break, on which llama.cpp's splitting of text recurses character by character."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from swift_gguf import Llama
from swift_gguf.errors import ContextFullError, SwiftError
from swift_gguf.model.model import Model
from swift_gguf.native.deep_stack import MOST, SHALLOW, on_deep_stack
from swift_gguf.text.text import encode, piece

LONG = 60_000
RECURSIVE = {
    "gpt-4o": ("a", "A", ".", " ", "\n", "中"),
    "tekken": ("a", "é"),
    "default": ("0", "."),
    "deepseek-v3": ("e\u0301", "一", " \n"),
    "exaone-moe": ("a b ",),
    "whitespace": ("a",),
}

CALL = """
import sys
from swift_gguf.model import Model, ModelOptions
from swift_gguf.native.binding import library
model = Model(sys.argv[1], ModelOptions(n_gpu_layers=0))
if sys.argv[2] == "unguarded":
    library().stack_characters = lambda vocab, text: 0
ids = library().tokenize(model.vocab, b"." * 200_000, add_special=False, parse_special=False)
print(len(ids))
"""


@pytest.mark.parametrize("pre", RECURSIVE)
def test_text_without_a_break(
    pre: str, tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    model = open_model(tiny("llama", pre=pre))
    for part in RECURSIVE[pre]:
        text = part * (LONG // len(part))
        ids = encode(model, text, special=False)
        assert b"".join(piece(model, token) for token in ids).decode() == text


@pytest.mark.skipif(sys.platform != "linux", reason="other libraries do not recurse")
@pytest.mark.parametrize(("how", "status"), [("guarded", 0), ("unguarded", -signal.SIGSEGV)])
def test_the_process_would_end(how: str, status: int, tiny: Callable[..., Path]) -> None:
    """The control: without a deep stack this is a crash."""
    path = tiny("llama", pre="default")
    done = subprocess.run([sys.executable, "-c", CALL, path, how], capture_output=True, text=True)
    assert done.returncode == status
    assert (done.stdout == "200000\n") == (status == 0)


def test_a_llama_takes_long_texts(tiny: Callable[..., Path]) -> None:
    llama = Llama(str(tiny("llama", pre="gpt-4o")), n_gpu_layers=0, verbose=False)
    assert len(llama.tokenize(b"." * LONG)) > 0
    with pytest.raises(ContextFullError, match="can be tokenised"):
        llama.tokenize(b"." * (MOST + 1))
    llama.close()


def test_a_text_beyond_any_stack_is_refused(
    tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    with pytest.raises(ContextFullError, match=f"has {MOST + 1} characters"):
        encode(open_model(tiny("llama")), "é" * (MOST + 1))


def test_what_is_called_returns_and_raises_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    here = threading.current_thread()
    usual = threading.stack_size()
    assert on_deep_stack(SHALLOW, threading.current_thread) is here
    assert on_deep_stack(SHALLOW + 1, threading.current_thread) is not here
    with pytest.raises(ZeroDivisionError):
        on_deep_stack(SHALLOW + 1, lambda: 1 // 0)

    def no_memory(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_memory)
    with pytest.raises(SwiftError, match="not enough memory"):
        on_deep_stack(SHALLOW + 1, lambda: 1)
    assert threading.stack_size() == usual
