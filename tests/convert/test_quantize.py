"""Quantisation through libllama: every type, what can be said of single tensors, importance."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from swift_gguf.convert import calibrate, imatrix
from swift_gguf.convert.imatrix import Collector, Usage
from swift_gguf.convert.run import ConvertOptions
from swift_gguf.errors import ConvertError
from swift_gguf.gguf import header as gguf_header
from swift_gguf.model.model import Model
from swift_gguf.native.convert import (
    NEED_IMATRIX,
    Quantization,
    file_types,
    quantize_file,
    tensor_types,
)
from swift_gguf.prepare.statistics import Energy
from swift_gguf.prepare.texts import Text

TEXTS = [Text(prompt=list(range(40, 70)), answers=[list(range(70, 130)), list(range(100, 140))])]
REPORT: Callable[..., None] = lambda *_: None  # noqa: E731


def test_there_is_every_type_that_llama_cpp_has() -> None:
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_K_M", "Q6_K", "Q8_0", "IQ1_S", "IQ4_XS", "TQ2_0"} <= {
        *file_types()
    }
    assert {"F32", "F16", "Q4_K", "IQ4_NL", "Q8_0"} <= {*tensor_types()}
    assert not {"Q8_K", "I32", "COUNT"} & {*tensor_types()}
    assert Quantization(name="q4_k").name == "q4_k"


@pytest.mark.slow
def test_every_type_makes_a_model_that_runs(
    converted: Callable[..., Path], tmp_path: Path, open_model: Callable[..., Model]
) -> None:
    source = converted("llama-spm")
    means = calibrate.collect(source, TEXTS, report=REPORT).means()
    sizes = {}
    for name in file_types():
        out = tmp_path / f"{name}.gguf"
        quantize_file(source, out, Quantization(name=name), imatrix=means)
        header = gguf_header.read(out)
        assert header.metadata["general.file_type"] == file_types()[name]
        sizes[name] = out.stat().st_size
        model = open_model(out)
        model.decode(TEXTS[0].prompt)
        assert np.isfinite(model.logits(0)).all(), name
        model.close()
    assert sizes["F32"] > sizes["F16"] > sizes["Q8_0"] > sizes["Q4_K_M"] > sizes["IQ2_XXS"]


def test_single_tensors_can_have_types_of_their_own(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    wanted = Quantization(
        name="Q4_0",
        output_tensor_type="q8_0",
        token_embedding_type="f16",
        overrides=((r"blk\.1\.ffn_(up|gate)", "q5_1"), ("ffn_", "q5_0")),
    )
    quantize_file(converted("llama-spm"), tmp_path / "model.gguf", wanted)
    names = {value: name for name, value in tensor_types().items()}
    tensors = gguf_header.read(tmp_path / "model.gguf").tensors
    types = {name.removesuffix(".weight"): names[tensor.type] for name, tensor in tensors.items()}
    assert types["output"] == "Q8_0"
    assert types["token_embd"] == "F16"
    assert types["blk.1.ffn_up"] == types["blk.1.ffn_gate"] == "Q5_1"
    assert types["blk.0.ffn_up"] == types["blk.1.ffn_down"] == "Q5_0"
    assert types["blk.0.attn_q"] == "Q4_0"
    assert types["blk.0.attn_norm"] == "F32"
    plain = Quantization(name="Q4_0", leave_output_tensor=True)
    quantize_file(converted("llama-spm"), tmp_path / "plain.gguf", plain)
    assert gguf_header.read(tmp_path / "plain.gguf").tensors["output.weight"].type == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "Q4_X"}, "there is no type 'Q4_X'; there are F32"),
        ({"name": "Q4_0", "output_tensor_type": "I32"}, "no type 'I32' of tensors"),
        ({"name": "Q4_0", "token_embedding_type": "x"}, "no type 'x' of tensors"),
        ({"name": "Q4_0", "overrides": (("ffn", "x"),)}, "no type 'x' of tensors"),
        ({"name": "Q4_0", "overrides": (("(ffn", "q8_0"),)}, "not a regular expression"),
        ({"name": "Q4_0", "overrides": (("(?i)ffn", "q8_0"),)}, "without '(?'"),
        ({"name": "Q4_0", "overrides": ((r"\\(?<=blk)\Affn", "q8_0"),)}, "ECMAScript's"),
        ({"name": "Q4_0", "overrides": (("(?P<a>ffn)", "q8_0"),)}, "ECMAScript's"),
        ({"name": "Q4_0", "overrides": ((r"ffn\Z", "q8_0"),)}, r"without '\\Z'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConvertError, match=re.escape(words)):
        Quantization(**options)  # type: ignore[arg-type]


def test_types_that_need_importance_are_refused_without(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    for name in NEED_IMATRIX:
        with pytest.raises(ConvertError, match="--imatrix auto"):
            ConvertOptions(quantization=Quantization(name=name))
        with pytest.raises(ConvertError, match="--imatrix auto"):
            quantize_file(converted("llama-spm"), tmp_path / "x.gguf", Quantization(name=name))
    for quantization in (
        Quantization(name="Q4_0", output_tensor_type="iq2_xxs"),
        Quantization(name="Q4_0", token_embedding_type="IQ1_S"),
        Quantization(name="Q4_0", overrides=(("attn", "q8_0"), (r"ffn_(?:up|down)\(?", "iq3_xxs"))),
    ):
        with pytest.raises(
            ConvertError, match=r"(?i)^iq\w+ needs an importance matrix; .* --imatrix auto"
        ):
            ConvertOptions(quantization=quantization)
        ConvertOptions(quantization=quantization, auto_imatrix=True)
    with pytest.raises(ConvertError, match="needs --quantize"):
        ConvertOptions(auto_imatrix=True)


def test_an_importance_matrix_of_another_model_is_told_from_none(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    name = "blk.0.attn_k.weight"
    for size, words in ((64, "for another model"), (256, "lacks a tensor")):
        means = {name: np.ones(size, np.float32)}
        with pytest.raises(ConvertError, match=words) as caught:
            quantize_file(
                converted("llama-spm"),
                tmp_path / "x.gguf",
                Quantization(name="IQ2_S"),
                imatrix=means,
            )
        assert "\n" not in str(caught.value)


def test_a_damaged_source_is_refused(converted: Callable[..., Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(converted("llama-spm").read_bytes()[:-5000])
    with pytest.raises(ConvertError, match="cannot be quantised to Q4_0"):
        quantize_file(damaged, tmp_path / "x.gguf", Quantization(name="Q4_0"))


# -- importance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3moe"])
def test_importance_is_what_columns_are_multiplied_by(
    tiny: Callable[..., Path], open_model: Callable[..., Model], family: str
) -> None:
    path = tiny(family)
    usage = calibrate.collect(path, TEXTS, report=REPORT).usage
    n_tokens = sum(len(TEXTS[0].prompt) + len(answer) for answer in TEXTS[0].answers)
    header = gguf_header.read(path)
    for name, use in usage.items():
        shape = header.tensors[name].shape
        assert use.sums.shape == (shape[2] if len(shape) > 2 else 1, shape[0]), name
        assert (use.sums > 0).any(), name
    matrices = {
        name
        for name, tensor in header.tensors.items()
        if len(tensor.shape) > 1 and name != "token_embd.weight"
    }
    assert matrices <= set(usage), "a weight was not seen"
    assert usage["blk.0.attn_q.weight"].counts.tolist() == [n_tokens]
    if family == "qwen3moe":
        used = header.metadata["qwen3moe.expert_used_count"]
        assert usage["blk.0.ffn_up_exps.weight"].counts.sum() == used * n_tokens
        return
    energy = Energy(header.metadata["llama.block_count"])
    model = open_model(path)
    with model.observe_ffn(energy):  # counts the same by other means
        for answer in TEXTS[0].answers:
            model.clear()
            whole = [*TEXTS[0].prompt, *answer]
            model.decode(whole, n_outputs=len(whole), exact=False)
    for layer, squares in enumerate(energy.squares):
        assert squares is not None
        seen = usage[f"blk.{layer}.ffn_down.weight"].sums[0]
        np.testing.assert_allclose(seen, squares, rtol=0.02, atol=1e-4 * squares.max())


def test_importance_matrices_are_read_as_they_were_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    collector = Collector()
    rows = rng.standard_normal((5, 1, 8)).astype(np.float32)
    collector("dense.weight", rows, None, 1)
    collector("dense.weight", rows, None, 1)
    experts = np.array([[0, 2], [2, 1], [0, 1], [2, 0], [1, 0]], np.int32)
    collector("experts.weight", rows, experts, 4)
    expected = {"dense.weight": (rows[:, 0] ** 2).mean(0)}
    per_expert = [(rows[(experts == e).any(1), 0] ** 2).mean(0) for e in range(3)]
    expected["experts.weight"] = np.concatenate([*per_expert, np.ones(8)])  # the last was not used
    path = tmp_path / "imatrix.gguf"
    imatrix.write(path, collector.usage, text="a test")
    assert gguf_header.read(path).metadata["general.type"] == "imatrix"
    found = imatrix.read(path)
    assert found.keys() == expected.keys()
    for name, means in expected.items():
        np.testing.assert_allclose(found[name], means, rtol=1e-5)


def test_the_older_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    values = np.arange(4, dtype="<f4")
    name = b"blk.0.attn_q.weight"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii", 2, 4) + values.tobytes()
    path.write_bytes(struct.pack("<i", 1) + entry)
    assert imatrix.read(path)[name.decode()].tolist() == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"\x01\x00\x00\x00",
        struct.pack("<i", 1 << 30),
        struct.pack("<ii", 1, 1 << 30),
        struct.pack("<ii4siif", 1, 4, b"name", 1, 1 << 20, 0.0),
        struct.pack("<ii4siif", 1, 4, b"name", 1, 1, float("nan")),
    ],
)
def test_what_is_no_importance_matrix_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(content)
    with pytest.raises(ConvertError, match=r"imatrix\.dat"):
        imatrix.read(path)


def test_importance_changes_what_is_rounded(converted: Callable[..., Path], tmp_path: Path) -> None:
    source = converted("llama-spm")
    sums = calibrate.collect(source, TEXTS, report=REPORT)
    outs = []
    for number, means in enumerate(({}, sums.means())):
        outs.append(tmp_path / f"{number}.gguf")
        quantize_file(source, outs[-1], Quantization(name="Q4_K_M"), imatrix=means)
    assert outs[0].read_bytes() != outs[1].read_bytes()
    ones = Usage(np.zeros((1, 4)), np.zeros(1, np.int64))
    assert ones.means.tolist() == [1, 1, 1, 1]


def test_a_device_is_no_importance_matrix() -> None:
    for device in ("/dev/zero", "/dev"):
        with pytest.raises(
            ConvertError, match=f"{device} cannot be read: it is not a regular file"
        ):
            imatrix.read(Path(device))
