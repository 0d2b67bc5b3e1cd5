"""Checkpoints that are quantised already: which are unpacked, and which are refused at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from swift_gguf.convert import converter, plan
from swift_gguf.convert.checkpoint import read as checkpoint_of
from swift_gguf.convert.checkpoint import text_config
from swift_gguf.convert.quantized import Packing, packing, require_readable
from swift_gguf.errors import ConvertError
from tests.convert.conftest import convert

Tensors = Mapping[str, torch.Tensor]


def require(found: Packing | None, module: str = "llama") -> None:
    assert found
    sources = converter.find() / "conversion"
    require_readable(found, "hf:owner/repo", sources=sources, module=module)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_4bit": True}, "bitsandbytes"),  # as older versions wrote it
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq, 4 bits"),
        *(
            ({"quant_method": method}, method)
            for method in ("hqq", "eetq", "torchao", "quanto", "aqlm", "higgs", "fbgemm_fp8")
        ),
        ({"quant_method": "gptq", "bits": 3}, "gptq, 3 bits"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            "compressed-tensors, marlin-24",
        ),
        ({"quant_method": "mxfp4"}, "mxfp4"),  # of Llama; GPT-OSS has it
    ],
)
@pytest.mark.parametrize("where", ["config", "text_config"])
def test_what_the_converter_does_not_unpack_is_refused(
    said: object, words: str, where: str
) -> None:
    config = {"quantization_config": said}
    whole = config if where == "config" else {"text_config": config}
    with pytest.raises(ConvertError) as caught:
        require(packing(text_config(whole), {"config.json"}))
    text = str(caught.value)
    assert text.startswith(f"the weights of hf:owner/repo are quantised ({words}")
    assert "use the original 16-bit model" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "bitnet"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        *(
            {"quant_method": "compressed-tensors", "format": kind}
            for kind in ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")
        ),
    ],
)
def test_what_the_converter_unpacks_passes(said: object) -> None:
    require(packing({"quantization_config": said}, set()))


def test_what_is_not_quantised_is_not_judged() -> None:
    configs: tuple[dict[str, object], ...] = (
        {},
        {"quantization_config": None},
        {"quantization_config": {}},
        {"quantization_config": []},
        {"quantization": "none"},
    )
    for config in configs:
        assert packing(config, {"config.json"}) is None


@pytest.mark.parametrize(
    ("method", "kind", "module"),
    [("mxfp4", None, "gpt_oss"), ("compressed-tensors", "mxfp4-pack-quantized", "kimi_k3")],
)
def test_forms_of_one_architecture_pass_for_that_one(
    method: str, kind: str | None, module: str
) -> None:
    found = Packing(method=method, format=kind)
    require(found, module)
    with pytest.raises(ConvertError):
        require(found)
    with pytest.raises(ConvertError, match="bitsandbytes"):
        require(Packing(method="bitsandbytes"), module)


def test_tools_that_leave_config_json_as_it_is_are_known_by_their_files() -> None:
    mlx = {"group_size": 64, "bits": 4}
    for config, files, method in (
        ({"quantization": mlx, "quantization_config": mlx}, set(), "MLX"),
        ({}, {"quantize_config.json"}, "GPTQ"),
        ({}, {"quant_config.json"}, "AWQ"),
    ):
        found = packing(config, files)
        assert found
        assert found.method == method
        with pytest.raises(ConvertError, match=method):
            require(found)


# -- unpacked for real -----------------------------------------------------------------------------


def fp8(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """Blocks of 128 times 128, each with a scale of 2."""
    blocks = [-(-n // 128) for n in weight.shape]
    return {
        f"{name}.weight": (weight / 2).to(torch.float8_e4m3fn),
        f"{name}.weight_scale_inv": torch.full(blocks, 2.0),
    }


def in_4_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values 0 to 15 [rows, columns] around 8, and scales [rows, groups of 32 columns]."""
    rows, columns = weight.shape
    scales = weight.reshape(rows, -1, 32).abs().amax(-1) / 7
    values = (weight / scales.repeat_interleave(32, 1)).round() + 8
    return values.clamp(0, 15).to(torch.int32).reshape(rows, columns), scales


def packed(values: torch.Tensor) -> torch.Tensor:
    """Eight of 4 bits in a number, along the last dimension."""
    shifts = 4 * torch.arange(8, dtype=torch.int64)
    eights = values.to(torch.int64).reshape(*values.shape[:-1], -1, 8)
    whole = (eights << shifts).sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def gptq(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    values, scales = in_4_bits(weight)
    zeros = torch.full((scales.shape[1], scales.shape[0]), 7)  # one less than what is taken off
    return {
        f"{name}.qweight": packed(values).T.contiguous(),
        f"{name}.qzeros": packed(zeros),
        f"{name}.scales": scales.T.contiguous().half(),
        f"{name}.g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // 32,
    }


def pack_quantized(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    values, scales = in_4_bits(weight)
    return {
        f"{name}.weight_packed": packed(values),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }


GROUP = {"weights": {"num_bits": 4, "group_size": 32, "strategy": "group", "type": "int"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        (
            pack_quantized,
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": GROUP},
            },
        ),
    ],
)
def test_packed_weights_are_those_of_the_model(
    checkpoint: Callable[..., Path],
    converted: Callable[..., Path],
    tmp_path: Path,
    pack: Callable[[torch.Tensor, str], dict[str, torch.Tensor]],
    said: Mapping[str, object],
) -> None:
    folder = Path(shutil.copytree(checkpoint("llama-spm"), tmp_path / "packed"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = said
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        is_packed = name.endswith("_proj.weight")
        tensors |= pack(weight, name.removesuffix(".weight")) if is_packed else {name: weight}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found, whole = (checkpoint_of(path) for path in (folder, checkpoint("llama-spm")))
    assert found.n_params == pytest.approx(whole.n_params, rel=0.1)
    sizes = [plan.expected_bytes(each, "Q4_K_M") for each in (found, whole)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
    plain, unpacked = (
        {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
        for path in (converted("llama-spm"), convert(folder, tmp_path / "x.gguf", outtype="f32"))
    )
    assert plain.keys() == unpacked.keys()
    for name, weights in plain.items():
        error = np.abs(unpacked[name] - weights).max() / np.abs(weights).max()
        assert error < 0.08, name
