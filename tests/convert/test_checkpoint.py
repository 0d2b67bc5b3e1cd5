"""What is wrong with a checkpoint is said in one line before anything is converted."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from swift_gguf.convert import checkpoint, converter, plan
from swift_gguf.errors import ConvertError
from tests.unit.test_models import Hub, hub, serve  # noqa: F401

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def safetensors(path: Path, tensors: dict[str, tuple[int, ...]], kind: str = "F32") -> Path:
    """A file of zeros."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        size = 4 if kind == "F32" else 2
        for n in shape:
            size *= n
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}  # type: ignore[assignment]
        at += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(at))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in two files, as far as can be told without reading weights."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    names = {}
    for number, tensors in enumerate(
        (
            {"model.embed_tokens.weight": (100, 8), "model.norm.weight": (8,)},
            {"lm_head.weight": (100, 8)},
        ),
        start=1,
    ):
        part = safetensors(folder / f"model-0000{number}-of-00002.safetensors", tensors)
        names |= dict.fromkeys(tensors, part.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def refusal(folder: Path, **options: bool) -> str:
    with pytest.raises(ConvertError) as caught:
        checkpoint.read(folder, **options)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


def test_a_whole_checkpoint_is_read(folder: Path) -> None:
    found = checkpoint.read(folder)
    assert found.architecture == "LlamaForCausalLM"
    assert [part.name[:11] for part in found.parts] == ["model-00001", "model-00002"]
    assert found.n_params == 1608
    assert found.n_bytes == sum(part.stat().st_size for part in found.parts)
    assert not found.ties_embeddings
    assert found.outtype == "f16"


def test_the_key_tells_what_a_conversion_would_read(folder: Path) -> None:
    before = checkpoint.read(folder).key
    assert checkpoint.read(folder).key == before
    for name in ("model.gguf", "model.swift.gguf", "model.gguf.convert/a.json", "notes.log"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("made of it, or nothing to do with it")
    assert checkpoint.read(folder).key == before
    for name in ("tokenizer.json", "model-00002-of-00002.safetensors"):
        os.utime(folder / name, (1, 1))
        assert checkpoint.read(folder).key != before
        before = checkpoint.read(folder).key


def _cut(folder: Path) -> None:
    part = folder / "model-00002-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-100])


def _overwrite(at: int, data: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with (folder / "model-00001-of-00002.safetensors").open("r+b") as file:
            file.seek(at)
            file.write(data)

    return apply


def _header(change: Callable[[dict[str, dict[str, object]]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        part = folder / "model-00001-of-00002.safetensors"
        data = part.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        change(header)
        raw = json.dumps(header).encode()
        part.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    return apply


def _row(**values: object) -> Callable[[Path], None]:
    return _header(lambda header: header["model.norm.weight"].update(values))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no configuration"),
        (lambda folder: (folder / "config.json").write_text("{}"), "names no architecture"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (
            lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
            "lacks 1 of 2 files of weights: model-00002-of-00002.safetensors",
        ),
        (_cut, "cut short"),
        (_overwrite(0, struct.pack("<Q", 1 << 60)), "does not begin as safetensors do"),
        (_overwrite(8, b"\xff\xff\xff"), "header cannot be read"),
        (_row(shape=[9]), "not as long as it should be"),
        (_row(data_offsets=[0, 32]), "not where it should be"),
        (_row(data_offsets=["a", 32]), "header cannot be read"),
        (_row(shape=None), "header cannot be read"),
        (_header(lambda header: header.pop("model.norm.weight")), "where its tensors need"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "../../etc/passwd"}})
            ),
            "does not say where the weights are",
        ),
        (
            lambda folder: safetensors(
                folder / "model-00002-of-00002.safetensors", {"other": (100, 8)}
            ),
            "lacks the tensor lm_head.weight",
        ),
    ],
)
def test_what_is_wrong_is_said(folder: Path, damage: Callable[[Path], object], words: str) -> None:
    checkpoint.read(folder)
    damage(folder)
    assert words in refusal(folder)


def test_pickles_are_refused_with_the_reason(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    assert "no weights" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert "a pickle is a program" in refusal(folder)
    found = checkpoint.read(folder, allow_pickle=True)
    assert [part.name for part in found.parts] == ["pytorch_model.bin"]


def test_a_tokenizer_that_is_a_program_is_refused(folder: Path) -> None:
    config = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "--trust-remote-code" in refusal(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": ["own.Own", None]}))
    assert "--trust-remote-code" in refusal(folder)
    checkpoint.read(folder, trust_code=True)
    # code of the model is never run: the converter and transformers bring their own
    config = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    checkpoint.read(folder)


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    known = converter.architectures(converter.find())
    assert {"LlamaForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM"} <= known
    converter.require_architecture("LlamaForCausalLM", known)
    with pytest.raises(ConvertError, match=r"'LlamaForCausalLN' \(did you mean Llama") as caught:
        converter.require_architecture("LlamaForCausalLN", known)
    assert all(name in str(caught.value) for name in known)


def test_the_plan_asks_for_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checkpoint.read(folder)
    wanted = plan.Plan(intermediate=3000, model=1000, sidecar=0, folder=folder)
    assert wanted.needed == 4000 + plan.SPARE_BYTES
    wanted.require_space()
    again = dataclasses.replace(wanted, has_intermediate=True, copies=True, sidecar=100)
    assert again.needed == 2000 + plan.SPARE_BYTES
    again = dataclasses.replace(again, has_model=True)
    assert again.needed == 1000 + plan.SPARE_BYTES
    usage = shutil.disk_usage(folder)._replace(free=wanted.needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ConvertError, match="are free; free some space"):
        wanted.require_space()
    # a head is kept at more bits than the rest
    sizes = [plan.expected_bytes(found, kind) for kind in ("F32", "F16", "Q8_0", "Q4_K_M", "IQ2_M")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 5


def test_a_checkpoint_comes_from_the_hub(folder: Path, hub: Hub) -> None:  # noqa: F811
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.files |= {"README.md": b"x", "pytorch_model.bin": b"x", "own.py": b"x", "sub/a.json": b"x"}
    without = checkpoint.look("hf:owner/repo")
    assert not [name for name in hub.fetched if "safetensors" in name and "index" not in name]
    seen: list[tuple[int, int]] = []
    path = checkpoint.fetch(
        "hf:owner/repo", progress=lambda done, total: seen.append((done, total))
    )
    assert {file.name for file in path.iterdir()} == {file.name for file in folder.iterdir()}
    whole = checkpoint.read(path)
    assert whole.n_params == 1608
    assert not without.tensors
    assert (without.parts, without.part_bytes) == (whole.parts, whole.part_bytes)
    assert checkpoint.look(str(path)) == whole
    assert seen[-1][0] == seen[-1][1] > 0
    checkpoint.fetch("hf:owner/repo", allow_pickle=True, trust_code=True)
    assert {"pytorch_model.bin", "own.py"} <= {file.name for file in path.iterdir()}
