"""Keys and values in other types than F16: drafts change no text, states come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.errors import ModelError
from swift_gguf.llama import Llama
from swift_gguf.speculation import SpeculationOptions
from tests.conftest import N_GPU_LAYERS
from tests.real.conftest import real as real

import llama_cpp  # isort: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(N_GPU_LAYERS != 0, reason="elsewhere than on CPUs, rounding may differ"),
]

F32, Q4_0, Q8_0 = llama_cpp.GGML_TYPE_F32, llama_cpp.GGML_TYPE_Q4_0, llama_cpp.GGML_TYPE_Q8_0
COLOURS = "red, green, blue, red, green, blue, " * 6
CODE = "def f(x):\n    return x + 1\n" * 6


def answers(path: Path, mode: str, **options: Any) -> list[str]:
    """Quantised keys are rotated by a product with as many columns as there are heads and tokens.
    Greedy and sampled, and after a state was saved and loaded."""
    speculation = SpeculationOptions(mode=mode, fixed=mode != "off", draft_max=9)
    llama = Llama(str(path), n_ctx=512, speculation=speculation, verbose=False, **options)

    def say(prompt: str, temperature: float) -> None:
        choice = llama.create_completion(prompt, max_tokens=24, temperature=temperature, seed=2)
        said.append(choice["choices"][0]["text"])
        used.update(
            name for name, source in llama.speculation.stats.sources.items() if source.drafted
        )

    said: list[str] = []
    used: set[str] = set()
    say(COLOURS, 1.0)
    say(CODE, 1.0)
    state = llama.save_state()
    say(COLOURS, 0.0)
    llama.load_state(state)
    say(CODE + said[1] + "then", 0.0)
    assert used >= {"ngram", "layer-skip"} if mode != "off" else not used
    llama.close()
    return said


@pytest.mark.parametrize(
    ("k", "v", "flash_attn"),
    [
        (Q8_0, Q8_0, True),
        (Q4_0, Q4_0, True),
        (Q8_0, None, False),
        (F32, F32, False),
    ],
)
def test_drafts_change_nothing(
    real: Callable[..., Path], k: int, v: int | None, flash_attn: bool
) -> None:
    path = real("smollm2-135m")
    options = {"type_k": k, "type_v": v, "flash_attn": flash_attn}
    expected = answers(path, "off", **options)
    assert answers(path, "ngram,recycling,layer-skip", **options) == expected


def test_quantised_values_need_flash_attention(real: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="flash_attn") as raised:
        Llama(str(real("smollm2-135m")), type_v=Q8_0, flash_attn=False, verbose=False)
    assert "\n" not in str(raised.value)
