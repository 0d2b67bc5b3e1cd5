"""Drafts change no text on architectures that the other tests do not have.

Attention sinks and windows in a mixture of experts, latent attention, parallel blocks, ALiBi, norms
after instead of before, partial RoPE, layers without any: random checkpoints, converted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from swift_gguf.llama import Llama
from swift_gguf.speculation import SpeculationOptions
from tests.conftest import N_GPU_LAYERS
from tests.convert.conftest import convert
from tests.llama.conftest import PlainLlama

pytestmark = pytest.mark.slow

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Bloom": {"n_layer": 4, "n_head": 4},
    "Cohere2": {"sliding_window": 64, "head_dim": 32, "rotary_pct": 1.0},
    "DeepseekV2": {
        "kv_lora_rank": 32,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "Exaone4": {"sliding_window": 64, "sliding_window_pattern": 4},
    "GptOss": {
        "head_dim": 32,
        "sliding_window": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Granite": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 64},
    "SmolLM3": {},
    "StableLm": {},
    "Starcoder2": {"sliding_window": None},
}
COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
PROMPTS = ("red, green, " * 40, "def f(x):\n" * 9)


@pytest.fixture
def made(tmp_path: Path, tokenizers: Callable[[str], Path]) -> Callable[[str], Path]:
    """`made("Olmo2")`: a GGUF in F16."""

    def make(name: str) -> Path:
        tokenizer = tokenizers("bpe")
        n_vocab = int((tokenizer / "vocab_size.json").read_text())
        options = COMMON | {"vocab_size": n_vocab} | ARCHITECTURES[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**options)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data *= 2  # or all tokens are as likely
        folder = tmp_path / "checkpoint"
        model.to(torch.float16).save_pretrained(folder)
        for file in tokenizer.iterdir():
            if file.name != "vocab_size.json":
                (folder / file.name).write_bytes(file.read_bytes())
        return convert(folder, tmp_path / "tiny.gguf", outtype="f16")

    return make


def answers(kind: type, path: Path, **options: Any) -> list[list[int]]:
    """Token ids: of tokens with more than 32 bytes, llama_cpp's own loses the text."""
    llama = kind(str(path), n_ctx=1024, n_gpu_layers=N_GPU_LAYERS, verbose=False, **options)
    said = []
    for prompt in PROMPTS:
        for temperature in (0.0, 1.0):
            llama.set_seed(1)
            tokens = llama.generate(llama.tokenize(prompt.encode()), temp=temperature)
            with closing(tokens):
                said.append(list(islice(tokens, 40)))
    if isinstance(llama, Llama) and llama.speculation.mode != "off":
        assert llama.speculation.stats.drafted > 0, llama.speculation.reason
    llama.close()
    return said


@pytest.mark.skipif(N_GPU_LAYERS != 0, reason="elsewhere than on CPUs, rounding may differ")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_source_says_what_plain_decoding_says(made: Callable[[str], Path], name: str) -> None:
    path = made(name)
    plain = answers(PlainLlama, path)
    assert answers(Llama, path, speculation="off") == plain
    chains = SpeculationOptions(mode="ngram,recycling,layer-skip", fixed=True, draft_max=7)
    assert answers(Llama, path, speculation=chains) == plain
    trees = replace(chains, tree="best-first")
    assert answers(Llama, path, speculation=trees, flash_attn=True) == answers(
        Llama, path, speculation="off", flash_attn=True
    )
