"""A GGUF says what its checkpoint says: tiny random models of every family, by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import transformers

from swift_gguf.convert.verify import Reference, compare, reference
from swift_gguf.gguf import header as gguf_header
from swift_gguf.model.model import Model
from swift_gguf.native.convert import Quantization, quantize_file
from swift_gguf.text.text import encode, piece
from tests.convert.checkpoints import ADDED, FAMILIES, SAMPLE
from tests.convert.conftest import convert

pytestmark = pytest.mark.slow

TEXT = "\n".join(SAMPLE)
ROUNDING = 1e-3  # of logits, which reach from -5 to 5
# Nats a token that a type may cost these models: about three times what it costs the worst, whose
# experts change places.
BOUNDS = {"Q8_0": 0.01, "Q4_0": 0.25}


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[..., Path]) -> Callable[[str], Reference]:
    """`expected(family)`: what transformers makes of the text."""
    known: dict[str, Reference] = {}

    def find(family: str) -> Reference:
        if family not in known:
            known[family] = reference(checkpoint(family), TEXT, n_tokens=160)
        return known[family]

    return find


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    converted: Callable[..., Path], expected: Callable[[str], Reference], family: str
) -> None:
    theirs = expected(family)
    assert np.abs(theirs.logits).max() > 1, "logits too small to compare"
    found = compare(converted(family), theirs)
    assert found.max_difference <= ROUNDING, found
    assert found.agreement == 1.0
    assert found.same_tokens
    assert not found.failures


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_models_stay_within_bounds(
    converted: Callable[..., Path],
    expected: Callable[[str], Reference],
    tmp_path: Path,
    family: str,
) -> None:
    costs = {}
    for name, bound in BOUNDS.items():
        out = tmp_path / f"{name}.gguf"
        quantize_file(converted(family), out, Quantization(name=name))
        costs[name] = compare(out, expected(family)).divergence
        assert costs[name] <= bound, costs
    assert 0 < costs["Q8_0"] < costs["Q4_0"], "nothing was quantised"


@pytest.mark.parametrize("family", ["llama", "qwen2", "llama-spm", "gemma3", "phi3"])
def test_the_tokenizer_reads_every_script_and_gives_it_back(
    checkpoint: Callable[..., Path],
    converted: Callable[..., Path],
    open_model: Callable[..., Model],
    family: str,
) -> None:
    folder = checkpoint(family)
    theirs: Callable[[str], list[int]]
    if family == "phi3":  # transformers puts no space before a text that begins with one
        processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
        theirs = lambda text: [processor.bos_id(), *processor.encode(text)]  # noqa: E731
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        theirs = lambda text: list(tokenizer(text)["input_ids"])  # noqa: E731
    model = open_model(converted(family))
    for text in SAMPLE:
        ids = encode(model, text)
        assert ids == theirs(text), text
        back = b"".join(piece(model, token) for token in ids).decode()
        assert back == (" " if family == "phi3" else "") + text


def test_special_and_added_tokens_and_the_chat_template_carry_over(
    checkpoint: Callable[..., Path],
    converted: Callable[..., Path],
    open_model: Callable[..., Model],
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint("llama-spm"))
    model = open_model(converted("llama-spm"))
    assert model.metadata("tokenizer.chat_template") == theirs.chat_template
    chat = theirs.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    ids = encode(model, chat)
    assert ids == theirs(chat)["input_ids"]
    assert {theirs.convert_tokens_to_ids(token) for token in ADDED} <= set(ids)
    for key, token in (("bos", theirs.bos_token_id), ("eos", theirs.eos_token_id)):
        assert model.metadata(f"tokenizer.ggml.{key}_token_id") == str(token)


def test_sharded_bfloat16_checkpoints_are_joined_exactly(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint("llama-spm", shard_bytes=1_000_000, dtype=torch.bfloat16, seed=3)
    assert len(list(folder.glob("*.safetensors"))) > 2
    out = convert(folder, tmp_path / "model.gguf", outtype="bf16")
    types = {t.type for t in gguf_header.read(out).tensors.values() if len(t.shape) > 1}
    assert types == {30}, "not stored as BF16"  # GGML_TYPE_BF16
    found = compare(out, reference(folder, TEXT, n_tokens=96))
    assert found.divergence < 1e-4  # llama.cpp rounds activations, too
    assert found.agreement > 0.95


def test_tied_embeddings_are_stored_once(converted: Callable[..., Path]) -> None:
    tensors = gguf_header.read(converted("qwen3")).tensors
    assert "output.weight" not in tensors
    assert "output.weight" in gguf_header.read(converted("llama")).tensors
