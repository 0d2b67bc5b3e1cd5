"""LoRA adapters: lossless under every source, and one line for what is none."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from swift_gguf.errors import ModelError
from swift_gguf.llama import Llama
from swift_gguf.speculation import SpeculationOptions
from tests.conftest import N_GPU_LAYERS
from tests.llama.conftest import PlainLlama

PROMPT = "def add(a, b):\n    return a + b\n\n" * 3
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, tiny_path: str) -> Write:
    """`write(rank=8, dtype=np.float16)`: an adapter of random numbers for the tiny llama."""

    def write_(
        *, rank: int = 8, dtype: Any = np.float32, architecture: str = "llama", n_extra: int = 0
    ) -> Path:
        rng = np.random.default_rng(0)
        path = tmp_path / f"{architecture}-{rank}-{np.dtype(dtype)}-{n_extra}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 16.0)
        for tensor in gguf.GGUFReader(tiny_path).tensors:
            if tensor.name.endswith(("attn_q.weight", "attn_v.weight", "ffn_down.weight")):
                n_in, n_out = int(tensor.shape[0]) + n_extra, int(tensor.shape[1])
                a = rng.standard_normal((rank, n_in)) * n_in**-0.5
                b = rng.standard_normal((n_out, rank)) * 0.1
                writer.add_tensor(f"{tensor.name}.lora_a", a.astype(dtype))
                writer.add_tensor(f"{tensor.name}.lora_b", b.astype(dtype))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write_


def said(llama: PlainLlama) -> list[str]:
    return [
        llama.create_completion(PROMPT, max_tokens=60, temperature=t, seed=5)["choices"][0]["text"]
        for t in (0.0, 0.9)
    ]


@pytest.mark.skipif(N_GPU_LAYERS != 0, reason="elsewhere than on CPUs, rounding may differ")
@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize(("rank", "dtype"), [(8, np.float32), (32, np.float16), (64, np.float32)])
def test_drafts_change_nothing(
    write: Write, open_llama: Callable[..., Any], rank: int, dtype: Any, flash_attn: bool
) -> None:
    options = {"lora_path": str(write(rank=rank, dtype=dtype)), "flash_attn": flash_attn}
    expected = said(open_llama(PlainLlama, **options))
    assert said(open_llama(PlainLlama, flash_attn=flash_attn)) != expected, (
        "the adapter does nothing"
    )
    for mode in ("off", "ngram,recycling", "layer-skip", "ngram,recycling,layer-skip"):
        speculation = SpeculationOptions(mode=mode, fixed=mode != "off", draft_max=9)
        llama = open_llama(speculation=speculation, **options)
        assert said(llama) == expected, mode
        assert mode == "off" or llama.speculation.stats.drafted > 0


def test_scale_and_pickling(write: Write, open_llama: Callable[..., Any]) -> None:
    llama = open_llama(lora_path=str(write()), lora_scale=2.0)
    expected = said(llama)
    assert said(open_llama(lora_path=str(write()), lora_scale=1.0)) != expected
    again = pickle.loads(pickle.dumps(llama))
    try:
        assert said(again) == expected
    finally:
        again.close()


def test_what_is_no_adapter_of_the_model(
    write: Write, tiny_path: str, tmp_path: Path, open_llama: Callable[..., Any]
) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("an adapter")
    for path, says in (
        (tmp_path / "none.gguf", "No such file"),
        (text, "not a GGUF file"),
        (tiny_path, "this is not an adapter"),
        (write(architecture="qwen2"), "model arch and LoRA arch mismatch"),
        (write(n_extra=32), "incorrect shape"),
    ):
        with pytest.raises(ModelError, match=says) as raised:
            Llama(tiny_path, lora_path=str(path), verbose=False, n_gpu_layers=0)
        assert "\n" not in str(raised.value)
        assert str(path) in str(raised.value)
