"""What is said of a step that failed: the one line of its log that matters, with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift_gguf.convert.steps import _reason

TRACEBACK = """\
INFO:hf-to-gguf:Set model tokenizer
Traceback (most recent call last):
  File "/x/conversion/base.py", line 1588, in get_vocab_base
    {line}
    ^^^^^^^~~~^^^
{error}
"""


@pytest.mark.parametrize(
    ("code", "log", "words"),
    [
        (
            1,
            TRACEBACK.format(line="x = self.hparams['rotary_pct']", error="KeyError: 'rotary_pct'"),
            "its config.json lacks 'rotary_pct'; transformers 5 uses names",
        ),
        (
            1,
            TRACEBACK.format(
                line="raise KeyError(...)",
                error="KeyError: \"could not find any of: ['n_layers', 'num_layers']\"",
            ),
            "its config.json lacks all of ['n_layers', 'num_layers']; transformers 5",
        ),
        (
            1,
            TRACEBACK.format(
                line='tokenizer.get_added_vocab()["<|user|>"]', error="KeyError: '<|user|>'"
            ),
            "its tokenizer lacks '<|user|>'",
        ),
        (
            1,
            TRACEBACK.format(
                line="assert max(tokenizer.vocab.values()) < vocab_size", error="AssertionError"
            ),
            "its tokenizer has more tokens than its embeddings have rows",
        ),
        (
            1,
            TRACEBACK.format(line="assert n_kv > 0", error="AssertionError"),
            "llama.cpp's converter failed: AssertionError in `assert n_kv > 0`",
        ),
        (1, "ValueError: Can not map tensor 'x'", "converter failed: ValueError: Can not map"),
        (-6, "/x/ggml.c:12: GGML_ASSERT(buffer) failed\nmore", "stopped by GGML_ASSERT(buffer)"),
        (-9, "", "the machine has probably run out of memory"),
        (1, "noise\nswift-gguf: the cause", "the cause"),
    ],
)
def test_the_line_that_matters(code: int, log: str, words: str) -> None:
    said = _reason(code, log, Path("/folder/model.gguf.convert/x.part"))
    assert words in said
    assert "\n" not in said
