"""The fixtures themselves: readable, deterministic, and with what they promise planted."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.fixtures import corrupt
from tests.fixtures.tiny_gguf import (
    ALL_FAMILIES,
    N_VOCAB,
    NO_FFN,
    QUANTS,
    default_n_layer,
    write_tiny,
)
from tests.fixtures.tokenizer import build_vocab, byte_to_char


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_is_a_small_readable_gguf(tmp_path: Path, family: str) -> None:
    path = write_tiny(tmp_path / "m.gguf", family)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == family
    assert reader.get_field(f"{family}.block_count").contents() == default_n_layer(family)
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == N_VOCAB
    assert path.stat().st_size < 2_000_000


def test_seed_decides_every_byte(tmp_path: Path) -> None:
    first = write_tiny(tmp_path / "a.gguf", "llama", seed=3).read_bytes()
    again = write_tiny(tmp_path / "b.gguf", "llama", seed=3).read_bytes()
    other = write_tiny(tmp_path / "c.gguf", "llama", seed=4).read_bytes()
    assert first == again
    assert first != other


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("quant", [None, "Q8_0"])
def test_planted_sub_layers_are_zero_and_nothing_else_changes(
    tmp_path: Path, family: str, quant: str | None
) -> None:
    plain = tensors(write_tiny(tmp_path / "a.gguf", family, quant=quant))
    planted = tensors(
        write_tiny(tmp_path / "b.gguf", family, quant=quant, noop_attn={1, 2}, noop_ffn={3})
    )
    changed = {name for name, tensor in plain.items() if (planted[name].data != tensor.data).any()}
    for name in changed:
        values = gguf.quants.dequantize(planted[name].data, planted[name].tensor_type)
        assert not np.any(values), name
    layers = {int(name.split(".")[1]) for name in changed}
    assert layers == ({1, 2} if family in NO_FFN else {1, 2, 3})


@pytest.mark.parametrize("quant", QUANTS)
def test_matrices_are_quantised_and_vectors_are_not(tmp_path: Path, quant: str) -> None:
    found = tensors(write_tiny(tmp_path / "m.gguf", "llama", quant=quant))
    assert found["blk.0.ffn_up.weight"].tensor_type.name == quant
    assert found["blk.0.ffn_norm.weight"].tensor_type.name == "F32"


def test_context_layers_and_tokenizer_are_parameters(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "qwen2", n_layer=7, n_ctx=64, tokenizer=False)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("qwen2.context_length").contents() == 64
    assert reader.get_field("qwen2.block_count").contents() == 7
    assert reader.get_field("tokenizer.ggml.tokens") is None


def test_vocabulary_has_every_byte_and_no_token_twice() -> None:
    vocab = build_vocab()
    assert len(set(vocab.tokens)) == len(vocab.tokens) == len(vocab.types)
    assert set(byte_to_char().values()) <= set(vocab.tokens)
    known = set(vocab.tokens)
    assert all({*merge.split(" "), merge.replace(" ", "")} <= known for merge in vocab.merges)


def test_layout_finds_what_the_reader_finds(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "lfm2")
    where, reader = corrupt.layout(path.read_bytes()), gguf.GGUFReader(path)
    assert list(where.infos) == [tensor.name for tensor in reader.tensors]
    assert where.data_at == reader.data_offset
    assert set(where.pairs) == {key for key in reader.fields if not key.startswith("GGUF.")}


def test_splicing_keeps_a_file_whole(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama")
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(corrupt.drop(path.read_bytes(), "tokenizer.*"))
    good, reader = tensors(path), gguf.GGUFReader(changed)
    assert not [key for key in reader.fields if key.startswith("tokenizer.")]
    for tensor in reader.tensors:
        assert np.array_equal(tensor.data, good[tensor.name].data)


def test_corruptions_differ_from_the_good_file(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama")
    into = tmp_path / "bad"
    into.mkdir()
    made = corrupt.corruptions(path, into, flips=3)
    assert len(made) > 80
    good = path.read_bytes()
    assert [name for name, bad in made.items() if bad.read_bytes() == good] == []
