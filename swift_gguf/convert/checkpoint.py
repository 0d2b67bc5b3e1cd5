"""Checks a checkpoint's folder before the conversion starts.

Only the headers of the weight files are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import filter as fnfilter
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

from swift_gguf.convert.quantized import Packing, packing
from swift_gguf.convert.safetensors_header import AGAIN, DTYPES, Tensor, read_safetensors
from swift_gguf.convert.vocabulary import require_embeddings
from swift_gguf.errors import ConvertError
from swift_gguf.hub import huggingface as hub
from swift_gguf.hub.downloads import Progress
from swift_gguf.text_files import read_text

_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model",
    "*.tiktoken", "*vocab*.txt", "tokenization_*.py",
)  # fmt: skip
_CONFIGS = ("config.json", "tokenizer_config.json")
_TEMPLATES = "additional_chat_templates/*.jinja"
_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", _TEMPLATES)
"""The files that are downloaded from a repository besides the weights."""
_WEIGHTS = "model*.safetensors"
_INDEX = "model.safetensors.index.json"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
# What a folder may hold instead of weights in transformers' format, and what to do then.
_INSTEAD = (
    ("adapter_model.*", "an adapter (LoRA), not a whole model; convert its base model{base}"),
    ("*.gguf", "a GGUF already ({file}); use that one"),
    (
        "consolidated*",
        "weights in their makers' own format ({file}); use the version for transformers, with "
        "model.safetensors",
    ),
    (
        "pytorch_model*.safetensors",
        "weights under another name ({file}); copy the folder and rename it to model.safetensors",
    ),
    ("tf_model.h5", "weights for TensorFlow ({file}); use a version in safetensors"),
    ("flax_model.msgpack", "weights for Flax ({file}); use a version in safetensors"),
)
_READ = (*_FILES, _WEIGHTS, "*.py", "README.md")
"""The files that a conversion may read; README.md is the model card."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder that can be converted."""

    folder: Path
    name: str
    """The name in messages: the folder, or ``hf:owner/repo``."""
    architecture: str
    """As transformers names it: ``LlamaForCausalLM``."""
    parts: tuple[Path, ...]
    """The files with the weights."""
    part_bytes: tuple[int, ...]
    """Their sizes."""
    dtype: str
    """The type of the weights according to config.json, as safetensors names it."""
    trusts_code: bool
    """True if Python files of the folder may run."""
    tensors: Mapping[str, Tensor]
    """Empty if the weights are pickled, or not downloaded yet."""
    ties_embeddings: bool
    packing: Packing | None
    """How the weights are quantised; None if they are not."""

    @property
    def n_bytes(self) -> int:
        return sum(self.part_bytes)

    @property
    def largest_part(self) -> int:
        """Bytes."""
        return max(self.part_bytes)

    @property
    def n_params(self) -> int:
        """The number of weights; an estimate if `tensors` is empty."""
        known = sum(tensor.size for tensor in self.tensors.values())
        if known or not self.packing:
            return known or self.n_bytes // DTYPES[self.dtype]
        return 8 * self.n_bytes // (self.packing.bits or 8)

    @property
    def outtype(self) -> str:
        """The 16-bit type that loses least."""
        kinds = [tensor.dtype for tensor in self.tensors.values() if len(tensor.shape) > 1]
        return "bf16" if (kinds[0] if kinds else self.dtype) == "BF16" else "f16"

    @property
    def key(self) -> str:
        """32 hex digits: a hash of the names, sizes and times of the files that a conversion reads.

        Other files in the folder, such as a GGUF written there, do not change it.
        """
        digest = hashlib.sha256()
        for path in sorted([*self.folder.iterdir(), *self.folder.glob(_TEMPLATES)]):
            name = path.relative_to(self.folder).as_posix()
            read = path in self.parts or any(fnmatch(name, pattern) for pattern in _READ)
            if read and path.is_file():
                stat = path.stat()
                digest.update(f"{name}|{stat.st_size}|{stat.st_mtime_ns};".encode())
        return digest.hexdigest()[:32]


def read(
    folder: Path,
    *,
    name: str | None = None,
    allow_pickle: bool = False,
    trust_code: bool = False,
    listed: Mapping[str, int] | None = None,
) -> Checkpoint:
    """Checks a checkpoint.

    name: ``hf:owner/repo`` if `folder` is in the hub's cache; messages then show this name.
    allow_pickle: accept weights in ``pytorch_model.bin``, too.
    trust_code: let the checkpoint's Python files run, if its tokenizer needs them.
    listed: all files with their sizes, if the weights are not downloaded yet.

    Raises:
        ConvertError: something is missing, damaged, or not to be trusted.
    """
    try:
        return _read(folder, name, listed, allow_pickle=allow_pickle, trust_code=trust_code)
    except ConvertError as error:
        if name is None:
            raise
        again = f"remove {folder.parents[1]} and start again"
        text = str(error).replace(AGAIN, again).replace(f"{folder}", name)
        raise ConvertError(text) from error


def _read(
    folder: Path,
    name: str | None,
    listed: Mapping[str, int] | None,
    *,
    allow_pickle: bool,
    trust_code: bool,
) -> Checkpoint:
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise ConvertError(f"{folder}: {what}; name a checkpoint's folder, or hf:owner/repo")
    sizes = listed or {
        path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()
    }
    if "config.json" not in sizes:
        raise _no_model(folder, sizes, "config.json")
    config = _config(folder / "config.json")
    if not trust_code:
        _refuse_code(folder)
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise ConvertError(
            f"{folder} has no tokenizer (tokenizer.json or tokenizer.model); copy it there from "
            "the original checkpoint"
        )
    parts = _parts(folder, sizes, allow_pickle=allow_pickle)
    of_text = text_config(config)
    found = packing(of_text, sizes)
    tensors = {} if listed else _tensors(parts)
    _compare_with_index(folder, tensors)
    if found and found.bits:
        tensors = _unpacked(tensors, found.bits)
    _compare_with_tokenizer(folder, of_text, tensors)
    return Checkpoint(
        folder=folder,
        name=name or str(folder),
        architecture=_architecture(folder, config),
        parts=parts,
        part_bytes=tuple(sizes[part.name] for part in parts),
        dtype=_dtype(config),
        trusts_code=trust_code,
        tensors=tensors,
        ties_embeddings=not any(name.endswith("lm_head.weight") for name in tensors),
        packing=found,
    )


def _no_model(folder: Path, there: Collection[str], what: str) -> ConvertError:
    """there: names of all files; what: the missing file."""
    for pattern, instead in _INSTEAD:
        if files := sorted(fnfilter(there, pattern)):
            return ConvertError(
                f"{folder} holds {instead.format(file=files[0], base=_base_model(folder))}"
            )
    if what == "config.json":
        return ConvertError(
            f"{folder} has no config.json; name the folder that holds it and the weights"
        )
    return ConvertError(
        f"{folder} has no weights ({what}); download the whole checkpoint, or pass --allow-pickle "
        "if all its weights are pickled"
    )


def _base_model(folder: Path) -> str:
    """An adapter's base model as ", NAME"; empty if the adapter does not name it."""
    path = folder / "adapter_config.json"
    name = _config(path).get("base_model_name_or_path") if path.is_file() else None
    return f", {name}" if isinstance(name, str) and name else ""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with `text_config` merged over it, as llama.cpp's converter does."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def _tensors(parts: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of all safetensors files."""
    tensors: dict[str, Tensor] = {}
    where: dict[str, Path] = {}
    for part in parts:
        if part.suffix != ".safetensors":
            continue
        mine = read_safetensors(part)
        if twice := sorted(set(mine) & set(tensors)):
            raise ConvertError(
                f"{part.parent}: the tensor {twice[0]} is in {where[twice[0]].name} and in "
                f"{part.name}; remove the file that belongs to another version"
            )
        tensors |= mine
        where |= dict.fromkeys(mine, part)
    return tensors


def _unpacked(tensors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """The tensors with their real shapes: packed ones hold several weights in 32 bits."""
    return {
        name: Tensor(shape=(*tensor.shape, max(1, 32 // bits)), dtype="F16")
        if tensor.dtype == "I32" and name.endswith((".qweight", ".weight_packed"))
        else tensor
        for name, tensor in tensors.items()
    }


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(path, error=ConvertError))
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path} is damaged ({error!s:.80}); {AGAIN}") from None
    if not isinstance(config, dict):
        raise ConvertError(f"{path} is not a model's configuration; {AGAIN}")
    return config


def _architecture(folder: Path, config: Mapping[str, Any]) -> str:
    """The architecture of the language model, chosen as llama.cpp's converter does."""
    text = config.get("text_config")
    for values in (text if isinstance(text, dict) else {}, config):
        names = values.get("architectures")
        if isinstance(names, list) and names and isinstance(names[0], str):
            return names[0]
    if isinstance(config.get("ssm_cfg"), dict):  # Mamba's own checkpoints
        return str(config["ssm_cfg"].get("layer", "Mamba")) + "ForCausalLM"
    raise ConvertError(
        f"{folder}: config.json does not name an architecture; use the original config.json"
    )


def _dtype(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype", config.get("torch_dtype")))
    return {"float32": "F32", "bfloat16": "BF16"}.get(name, "F16")


def _refuse_code(folder: Path) -> None:
    """Refuses tokenizers that are Python code.

    Configurations that are Python code do no harm: `worker` never runs them.
    """
    for name in _CONFIGS:
        path = folder / name
        mapped = _config(path).get("auto_map") if path.exists() else None
        # older files have a list here, which is always about the tokenizer
        if isinstance(mapped, list) or (isinstance(mapped, dict) and "AutoTokenizer" in mapped):
            raise ConvertError(
                f"the tokenizer of {folder} is Python code from the checkpoint, which could do "
                "anything; read it, then pass --trust-remote-code to run it"
            )


def _parts(folder: Path, there: Collection[str], *, allow_pickle: bool) -> tuple[Path, ...]:
    """The files with weights, from the index if there is one.

    there: names of all files.
    """
    for index, pattern in (
        (_INDEX, _WEIGHTS),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        names = set(_weight_map(folder / index).values()) or fnfilter(there, pattern)
        parts = sorted(folder / name for name in names)
        if parts and pattern.endswith(".bin") and not allow_pickle:
            raise ConvertError(
                f"{folder} holds pickled weights ({parts[0].name}), and a pickle is a program that "
                "runs when it is read; use a version in safetensors, or pass --allow-pickle if you "
                "trust its source"
            )
        if missing := [part.name for part in parts if part.name not in there]:
            raise ConvertError(
                f"{folder} lacks {len(missing)} of {len(parts)} weight files: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; download them"
            )
        if parts:
            return tuple(parts)
    raise _no_model(folder, there, "model.safetensors")


def _weight_map(index: Path) -> Mapping[str, str]:
    if not index.exists():
        return {}
    weights = _config(index).get("weight_map")
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weights.values()
    ):
        raise ConvertError(f"{index} does not say where the weights are; {AGAIN}")
    return weights


def _compare_with_index(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    named = _weight_map(folder / _INDEX)
    if not (named and tensors):
        return
    if missing := sorted(set(named) - set(tensors)):
        part = named[missing[0]]
        raise ConvertError(f"{folder / part} lacks the tensor {missing[0]}; {AGAIN}")
    if more := sorted(set(tensors) - set(named)):
        raise ConvertError(
            f"{folder / _INDEX} does not list the tensor {more[0]}, which its files hold; {AGAIN}"
        )


def _compare_with_tokenizer(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Checks that tokenizer.json has no more tokens than the embeddings have rows.

    A tokenizer.model needs no check: the converter reads only as many tokens as there are rows.
    """
    if (folder / "tokenizer.model").is_file():
        return
    rows = [
        tensor.shape[0]
        for name, tensor in tensors.items()
        if name.endswith(_EMBEDDINGS) and len(tensor.shape) == 2
    ]
    limits = [max(rows)] if rows else []  # a speech model also has small embeddings
    if isinstance(config.get("vocab_size"), int):
        limits.append(config["vocab_size"])
    paths = (folder / name for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer, settings = (_config(path) if path.is_file() else {} for path in paths)
    require_embeddings(folder, min(limits, default=None), tokenizer, settings)


def fetch(found: Checkpoint, *, progress: Progress | None = None) -> Checkpoint:
    """Downloads the weights of a checkpoint that `look` found, if necessary.

    Raises:
        DownloadError: the download fails; ConvertError: as `read`.
    """
    if not found.name.startswith(hub.PREFIX):
        return found
    patterns = [*_FILES, *(escape(part.name) for part in found.parts)]
    if found.trusts_code:
        patterns.append("*.py")
    folder = hub.fetch_folder(found.name, patterns, progress=progress)
    is_pickle = any(part.suffix == ".bin" for part in found.parts)
    return read(folder, name=found.name, allow_pickle=is_pickle, trust_code=found.trusts_code)


def look(reference: str, *, allow_pickle: bool = False, trust_code: bool = False) -> Checkpoint:
    """Checks a folder or ``hf:owner/repo``, without downloading weights.

    Raises:
        ModelError: the reference is not valid; DownloadError: the repository cannot be read.
        ConvertError: as `read`.
    """
    if reference.startswith(hub.PREFIX):
        folder = hub.fetch_folder(reference, _FILES, progress=None)
        name, listed = reference, hub.list_folder(reference)
    else:
        folder, name, listed = Path(reference).expanduser(), None, None
    return read(folder, name=name, listed=listed, allow_pickle=allow_pickle, trust_code=trust_code)
