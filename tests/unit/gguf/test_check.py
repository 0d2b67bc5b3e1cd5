"""No file may end the process: what llama.cpp would abort on is refused before it sees it."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swift_gguf.errors import ModelError
from swift_gguf.gguf import check as gguf_check
from swift_gguf.gguf import header as gguf_header
from tests.fixtures import corrupt
from tests.fixtures.parts import as_in_a_cache, write_parts
from tests.fixtures.tiny_gguf import ALL_FAMILIES, N_VOCAB, write_tiny

# What llama.cpp (the pinned version) answered with SIGABRT, SIGSEGV or an endless loop when it
# was given these files; those of them that a family has.
CRASHES = (
    "block_count_0", "block_count_600", "block_count_4294967295", "tokens_duplicate",
    "rope_scaling_unknown", "type_i32", "rope.dimension_count_0", "rope.dimension_count_7",
    "rope.dimension_count_1048576", "expert_count_0", "expert_count_missing",
    "expert_count_1048576", "expert_used_count_0", "expert_used_count_64",
    "expert_used_count_missing",
)  # fmt: skip

# Damage that llama.cpp does not mind or answers politely for reasons of its own.
TOLERATED = frozenset(
    """n_tensors_0 n_pairs_less tensor_renamed type_other dim_more dims_swapped architecture_unknown
    context_length_0 context_length_4294967295 context_length_missing context_length_float
    embedding_length_63 embedding_length_1073741824 embedding_length_0 embedding_length_missing
    feed_forward_length_0 feed_forward_length_1073741824 feed_forward_length_missing
    attention.head_count_0 attention.head_count_1 attention.head_count_missing
    attention.head_count_kv_0 attention.head_count_kv_missing attention.key_length_missing
    attention.sliding_window_0 attention.sliding_window_4294967295
    attention.sliding_window_missing rope.dimension_count_missing block_count_1 expert_count_4
    ssm.conv_kernel_missing ssm.time_step_rank_missing shortconv.l_cache_1
    shortconv.l_cache_missing split_count_2 no_merges no_token_types tokenizer_unknown token_empty
    token_not_utf8 token_foreign merges_odd merges_none token_types_fewer eos_beyond
    bos_beyond""".split()  # noqa: SIM905
)


def refused(path: Path, content: bytes, *, tokenizer: bool = True) -> str:
    """The message of the refusal; empty where there is none."""
    path.write_bytes(content)
    try:
        gguf_check.check(path, tokenizer=tokenizer)
    except ModelError as error:
        message = str(error)
        assert message.startswith(f"{path.parent}/")  # the file, or a part beside it
        assert "\n" not in message
        assert "; " in message  # what is wrong; what to do
        return message
    return ""


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("quant", [None, "Q8_0"])
def test_good_files_pass(tmp_path: Path, family: str, quant: str | None) -> None:
    gguf_check.check(write_tiny(tmp_path / "m.gguf", family, quant=quant))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_what_crashes_llama_cpp_is_refused(tmp_path: Path, family: str) -> None:
    made = corrupt.damage(write_tiny(tmp_path / "m.gguf", family).read_bytes())
    accepted = []
    for name in CRASHES:
        # A number of rotated dimensions means something only where RoPE is used.
        if name in made and not refused(tmp_path / "bad.gguf", made[name]):
            accepted.append(name)
    assert accepted == []


@pytest.mark.parametrize("family", ["llama", "qwen2moe", "gemma3", "gpt2"])
def test_other_damage_is_named(tmp_path: Path, family: str) -> None:
    made = corrupt.damage(write_tiny(tmp_path / "m.gguf", family).read_bytes())
    accepted = {n for n, content in made.items() if not refused(tmp_path / "bad.gguf", content)}
    assert {n for n in accepted - TOLERATED if not n.endswith("_float")} == set()


def test_messages_say_what_is_wrong(tmp_path: Path) -> None:
    made = corrupt.damage(write_tiny(tmp_path / "m.gguf", "llama").read_bytes())
    for name, expected in {
        "empty": "not a GGUF file",
        "zip": "not a GGUF file",
        "truncated_metadata": "cut short",
        "truncated_data": "cut short",
        "truncated_end": "cut short",
        "version_99": "GGUF version 99",
        "no_tokenizer": "no tokenizer",
        "tokens_duplicate": "twice",
        "tokens_fewer": f"{N_VOCAB - 1} tokens but {N_VOCAB} embeddings",
        "rope_scaling_unknown": "mystery",
        "type_unknown": "type 999",
    }.items():
        assert expected in refused(tmp_path / "bad.gguf", made[name]), name


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(ModelError, match="cannot be read"):
            gguf_check.check(path)


def test_a_model_may_come_without_a_tokenizer_if_asked(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama", tokenizer=False)
    gguf_check.check(path, tokenizer=False)
    with pytest.raises(ModelError, match="no tokenizer"):
        gguf_check.check(path)


def test_norms_must_be_f32(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "m.gguf", "gpt2").read_bytes()
    # the last tensor of a layer: no offset after it changes with its size
    for name, kind in (("output_norm.weight", 1), ("blk.0.attn_norm.bias", 30)):
        info = corrupt.layout(data).infos[name]
        assert refused(tmp_path / "bad.gguf", corrupt.put(data, info.type_at, "I", kind))


def test_spm_vocabularies_need_their_byte_tokens(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "m.gguf", "llama").read_bytes()
    model = corrupt.layout(data).pairs["tokenizer.ggml.model"]
    data = corrupt.splice(data, model.value_at, model.end, struct.pack("<Q", 5) + b"llama")
    assert "byte token <0x00>" in refused(tmp_path / "bad.gguf", data)


def test_all_parts_of_a_split_model_are_looked_at(tmp_path: Path) -> None:
    good = write_tiny(tmp_path / "m.gguf", "llama").read_bytes()
    first = tmp_path / "big-00001-of-00002.gguf"
    split = corrupt.damage(good)["split_count_2"]
    assert "big-00002-of-00002.gguf is missing" in refused(first, split)
    (tmp_path / "big-00002-of-00002.gguf").write_bytes(good[:100])
    assert "cut short" in refused(first, split)
    (tmp_path / "big-00002-of-00002.gguf").write_bytes(good)
    assert "which part it is" in refused(first, split)


def test_parts_of_a_model_have_a_way_out(tmp_path: Path) -> None:
    first, second = write_parts(tmp_path)
    gguf_check.check(first)
    said = refused(second, second.read_bytes())
    assert said.endswith("it is part 2 of 2 of a model; name the first, big-00001-of-00002.gguf")
    assert "NAME-00001-of-00002.gguf" in refused(tmp_path / "x.gguf", second.read_bytes())
    joined = refused(tmp_path / "joined.gguf", first.read_bytes() + second.read_bytes())
    assert "concatenated, which does not give a model; keep them apart" in joined
    assert "llama-gguf-split --merge" in joined
    assert "concatenated" in refused(first, first.read_bytes() + second.read_bytes())


def test_a_blob_of_a_model_in_parts_needs_its_name(tmp_path: Path) -> None:
    first = as_in_a_cache(write_parts(tmp_path))
    gguf_check.check(first)
    blob = first.resolve()
    said = refused(blob, blob.read_bytes())
    assert "rename it to NAME-00001-of-00002.gguf (a link is enough)" in said


def test_large_vocabularies_are_read_quickly(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "m.gguf", "llama", tokenizer=False).read_bytes()
    at = corrupt.layout(data).infos_at
    pairs = b""
    for key in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges"):
        body = b"".join(struct.pack("<Q", 6) + b"%06d" % i for i in range(150_000))
        pairs += struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 150_000) + body
    path = tmp_path / "large.gguf"
    path.write_bytes(corrupt.splice(data, at, at, pairs, n_pairs=2))
    started = time.perf_counter()
    header = gguf_header.read(path)
    # 50 ms on an idle machine; a reader that builds an object for each string takes seconds
    assert time.perf_counter() - started < 1.0
    assert len(header.tokens) == 150_000


class Good:
    """Sound files to damage.  Not a list of bytes: hypothesis prints arguments."""

    def __init__(self, folder: Path) -> None:
        self.bad = folder / "bad.gguf"
        families = ("llama", "qwen2moe", "lfm2")
        self.contents = [
            write_tiny(folder / f"{family}.gguf", family, n_layer=2, quant="Q4_0").read_bytes()
            for family in families
        ]
        self.layouts = [corrupt.layout(content) for content in self.contents]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(tmp_path_factory.mktemp("good"))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    which=st.integers(0, 2),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.one_of(st.none(), st.floats(0, 1)),
)
def test_random_bytes_raise_nothing_but_model_errors(
    good: Good, which: int, edits: list[tuple[float, int]], cut: float | None
) -> None:
    data = bytearray(good.contents[which])
    for where, value in edits:
        data[int(where * (good.layouts[which].infos_end - 1))] = value
    if cut is not None:
        del data[int(cut * len(data)) :]
    refused(good.bad, bytes(data))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    which=st.integers(0, 2),
    number=st.integers(0, 30),
    kind=st.sampled_from([None, *range(14)]),
    value=st.binary(min_size=4, max_size=4),
)
def test_random_metadata_values_raise_nothing_but_model_errors(
    good: Good, which: int, number: int, kind: int | None, value: bytes
) -> None:
    data = bytearray(good.contents[which])
    pairs = list(good.layouts[which].pairs.values())
    pair = pairs[number % len(pairs)]
    data[pair.value_at : pair.value_at + 4] = value
    if kind is not None:
        data[pair.type_at] = kind
    refused(good.bad, bytes(data))
