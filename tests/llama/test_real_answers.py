"""Real models, loaded as people load them: what `Llama` says is what llama_cpp's own says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.llama import Llama
from tests.conftest import N_GPU_LAYERS
from tests.llama.conftest import PlainLlama
from tests.real.conftest import real as real

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(N_GPU_LAYERS != 0, reason="elsewhere than on CPUs, rounding may differ"),
]

QUESTIONS = ("What is the capital of France?", "Write a short poem about the sea.")
CODE = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n"


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m"])
def test_with_the_defaults_of_both(real: Callable[..., Path], name: str) -> None:
    """Drafts change nothing."""

    def answers(kind: type, **more: Any) -> list[str]:
        llama = kind(str(real(name)), verbose=False, **more)
        said = [
            llama.create_chat_completion(
                [{"role": "user", "content": question}], max_tokens=24, temperature=0.0
            )["choices"][0]["message"]["content"]
            for question in QUESTIONS
        ]
        said.append(llama.create_completion(CODE, max_tokens=32, seed=3)["choices"][0]["text"])
        llama.close()
        return said

    expected = answers(PlainLlama)
    assert answers(Llama) == expected
    assert answers(Llama, speculation="ngram,recycling,layer-skip") == expected
