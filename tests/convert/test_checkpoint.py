"""What is wrong with a checkpoint is said in one line before anything is converted."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.convert import checkpoint, converter, plan
from swift_gguf.convert.marks import without_marks
from swift_gguf.errors import ConvertError
from tests.cli.conftest import assert_one_line_failure, cli  # noqa: F401
from tests.hub.test_models import Hub, hub, serve  # noqa: F401

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def safetensors(path: Path, tensors: dict[str, tuple[int, ...]], kind: str = "F32") -> Path:
    """A file of zeros."""
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        size = 4 if kind == "F32" else 2
        for n in shape:
            size *= n
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
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
    parts: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (100, 8), "model.norm.weight": (8,)},
        {"lm_head.weight": (100, 8)},
    ]
    names: dict[str, str] = {}
    for number, tensors in enumerate(parts, start=1):
        part = safetensors(folder / f"model-0000{number}-of-00002.safetensors", tensors)
        names |= dict.fromkeys(tensors, part.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def refusal(folder: Path, **options: Any) -> str:
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


def test_the_key_tells_of_templates_in_a_folder_of_their_own(folder: Path) -> None:
    before = checkpoint.read(folder).key
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    with_template = checkpoint.read(folder).key
    assert with_template != before
    os.utime(folder / "additional_chat_templates" / "tool_use.jinja", (1, 1))
    assert checkpoint.read(folder).key != with_template


def _cut(folder: Path) -> None:
    part = folder / "model-00002-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-100])


def _overwrite(at: int, data: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with (folder / "model-00001-of-00002.safetensors").open("r+b") as file:
            file.seek(at)
            file.write(data)

    return apply


def _header(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Path], None]:
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


def _adds_token(where: str) -> Callable[[Path], None]:
    """A token beyond the embeddings."""
    vocabulary = {f"t{i}": i for i in range(100)}
    added = [{"id": 100, "content": "<|extra|>"}] if where == "added_tokens" else []
    if where == "vocab":
        vocabulary["<|extra|>"] = 100
    tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": added}
    return lambda folder: (folder / "tokenizer.json").write_text(json.dumps(tokenizer))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a model's configuration"),
        (lambda folder: (folder / "config.json").write_text("{}"), "does not name an architecture"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (
            lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
            "lacks 1 of 2 weight files: model-00002-of-00002.safetensors",
        ),
        (_cut, "cut short"),
        (_overwrite(0, struct.pack("<Q", 1 << 60)), "does not begin like a safetensors file"),
        (_overwrite(8, b"\xff\xff\xff"), "header cannot be read"),
        (_row(shape=[9]), "has the wrong size"),
        (_row(data_offsets=[0, 32]), "at the wrong offset"),
        (_row(data_offsets=["a", 32]), "header cannot be read"),
        (_row(shape=None), "header cannot be read"),
        (_header(lambda header: header.pop("model.norm.weight")), "but its tensors need"),
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
        (
            lambda folder: safetensors(
                folder / "model-00002-of-00002.safetensors", {"lm_head.weight": (8, 8), "x": (1,)}
            ),
            "does not list the tensor x",
        ),
        (
            lambda folder: (
                (folder / "model.safetensors.index.json").unlink(),
                safetensors(folder / "model.safetensors", {"lm_head.weight": (8, 8)}),
            ),
            "is in model-00002-of-00002.safetensors and in model.safetensors; remove the file",
        ),
        (
            lambda folder: (folder / "config.json").write_bytes(
                json.dumps(CONFIG).encode("utf-16-le")
            ),
            "config.json is not UTF-8 text",
        ),
        (
            _adds_token("added_tokens"),
            "the embeddings have 100 rows, and the tokenizer has 1 token",
        ),
        (_adds_token("vocab"), "('<|extra|>', id 100)"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, damage: Callable[[Path], object], words: str) -> None:
    checkpoint.read(folder)
    damage(folder)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["adapter_model.safetensors"], "an adapter (LoRA), not a whole model; convert its base"),
        (
            ["consolidated.safetensors", "params.json"],
            "makers' own format (consolidated.safetensors)",
        ),
        (["consolidated.00.pth"], "makers' own format"),
        (["pytorch_model.safetensors"], "rename it to model.safetensors"),
        (["tiny-Q4_K_M.gguf"], "a GGUF already (tiny-Q4_K_M.gguf)"),
        (["tf_model.h5"], "TensorFlow"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_other_weights_are_told_by_name(
    folder: Path, files: list[str], words: str, has_config: bool
) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    if not has_config:
        (folder / "config.json").unlink()
    for name in files:
        (folder / name).write_text("{}")
    assert words in refusal(folder)


def test_an_adapter_names_its_base(folder: Path) -> None:
    for path in [*folder.glob("model*"), folder / "config.json"]:
        path.unlink()
    (folder / "adapter_model.safetensors").touch()
    config = {"base_model_name_or_path": "owner/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert refusal(folder).endswith("convert its base model, owner/base")


def test_more_embeddings_than_tokens_are_no_fault(folder: Path) -> None:
    _adds_token("none")(folder)
    checkpoint.read(folder)
    # SentencePiece, of which the converter leaves out what is beyond
    _adds_token("added_tokens")(folder)
    (folder / "tokenizer.model").touch()
    checkpoint.read(folder)


def test_what_lies_beside_the_index_is_left_alone(folder: Path) -> None:
    before = checkpoint.read(folder)
    safetensors(folder / "model.safetensors", {"lm_head.weight": (1, 8)})
    safetensors(folder / "consolidated.safetensors", {"lm_head.weight": (1, 8)})
    after = checkpoint.read(folder)
    assert (after.parts, after.tensors) == (before.parts, before.tensors)


def test_files_may_begin_with_a_byte_order_mark(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ x }}")
    (folder / "own").mkdir()
    with without_marks(folder) as same:
        assert same == folder
    marked = [*folder.glob("*.json"), *folder.glob("additional_chat_templates/*")]
    texts = {path.relative_to(folder): path.read_bytes() for path in marked}
    for path in marked:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = checkpoint.read(folder)
    assert found.architecture == "LlamaForCausalLM"
    with without_marks(folder) as other:
        assert other.name == folder.name
        assert {name: (other / name).read_bytes() for name in texts} == texts
        for part in found.parts:
            assert (other / part.name).samefile(part)
    assert not other.exists()


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
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
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
    whole = checkpoint.fetch(without, progress=lambda done, total: seen.append((done, total)))
    path = whole.folder
    assert {file.name for file in path.iterdir()} == {file.name for file in folder.iterdir()}
    assert whole.n_params == 1608
    assert not without.tensors
    assert (without.parts, without.part_bytes) == (whole.parts, whole.part_bytes)
    assert without.name == whole.name == "hf:owner/repo"
    assert checkpoint.look(str(path)) == dataclasses.replace(whole, name=str(path))
    assert seen[-1][0] == seen[-1][1] > 0
    checkpoint.fetch(checkpoint.look("hf:owner/repo", trust_code=True))
    assert "own.py" in {file.name for file in path.iterdir()}
    for name in [name for name in hub.files if name.startswith("model")]:
        del hub.files[name]
    shutil.rmtree(path)
    found = checkpoint.look("hf:owner/repo", allow_pickle=True)
    assert checkpoint.fetch(found).parts[0].name == "pytorch_model.bin"


def test_the_hub_is_asked_for_all_files_of_the_index(folder: Path, hub: Hub) -> None:  # noqa: F811
    (folder / "model-00002-of-00002.safetensors").rename(folder / "mtp.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002", "mtp"))
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.files |= {"consolidated.safetensors": b"x", "additional_chat_templates/a.jinja": b"{{ x }}"}
    found = checkpoint.fetch(checkpoint.look("hf:owner/repo"))
    assert [part.name for part in found.parts] == ["model-00001-of-00002.safetensors",
                                                   "mtp.safetensors"]  # fmt: skip
    assert (found.folder / "additional_chat_templates" / "a.jinja").read_text() == "{{ x }}"
    assert "consolidated.safetensors" not in hub.fetched


def test_messages_name_the_repository_not_the_cache(folder: Path, hub: Hub) -> None:  # noqa: F811
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    part = hub.files.pop("model-00002-of-00002.safetensors")
    with pytest.raises(ConvertError, match=r"^hf:owner/repo lacks 1 of 2 weight files"):
        checkpoint.look("hf:owner/repo")
    hub.files["model-00002-of-00002.safetensors"] = part[:-1]
    with pytest.raises(ConvertError, match=r"^hf:owner/repo/model-00002") as caught:
        checkpoint.fetch(checkpoint.look("hf:owner/repo"))
    assert f"remove {folder.parent}/hub/models--owner--repo and start again" in str(caught.value)


def test_nothing_large_is_fetched_of_what_cannot_be_converted(
    folder: Path,
    hub: Hub,  # noqa: F811
    cli: Callable[..., subprocess.CompletedProcess[str]],  # noqa: F811
) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "awq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    where = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder.parent)}
    for flags in (["--dry-run"], []):
        done = cli("convert", "hf:owner/repo", "-o", folder.parent / "model.gguf", *flags, **where)
        assert_one_line_failure(done)
        assert "the weights of hf:owner/repo are quantised (awq, 4 bits)" in done.stderr
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]
    assert not list(folder.parent.glob("model.gguf*"))
