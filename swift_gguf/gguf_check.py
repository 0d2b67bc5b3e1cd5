"""Looks at a GGUF file before llama.cpp does.

llama.cpp refuses most damaged files politely, but some make it abort (and so end the process of
whoever loaded it) or loop for ever.  `check` finds those by reading the header, the metadata and
the tensor table alone, in plain Python: gguf.GGUFReader takes seconds on a large vocabulary.
The rules are assertions of the pinned llama.cpp and the needs of its CPU kernels.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

from swift_gguf.errors import ModelError

# ggml type -> (weights a block, bytes a block); what is not here is unknown or was removed.
_TYPES: dict[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8),
    28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip
# Integers, F64, and the blocks of activations: no operation takes them as weights.
_NO_WEIGHTS = frozenset({9, 15, 24, 25, 26, 27, 28})
# What is added, scaled with or convolved: the CPU has kernels for F32 alone.
_ONLY_F32 = re.compile(r"norm(_\d)?\.weight$|\.bias$|\.ssm_(a|d|conv1d\.weight)$|shortconv\.conv\.")

# GGUF value type -> struct format
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_U16, _U32, _STRING, _ARRAY = 2, 4, 8, 9
_KEEP_ITEMS = 4096  # longer arrays of numbers belong to the vocabulary: their length will do
# What a few bytes of file each would make hundreds of bytes of memory; no real model comes near.
_MAX_STRINGS = 1 << 21
_MAX_PAIRS = 1 << 12
_MAX_TENSORS = 1 << 16
_MAX_NAME = 63
_MAX_LAYERS = 512
_MAX_EXPERTS = 1024
_ROPE_SCALING = ("none", "linear", "yarn", "longrope")

# Architectures whose graphs assert that RoPE turns the whole head (and what _EQUAL_KV says).
_FULL_ROPE = frozenset({
    "apertus", "arcee", "arctic", "baichuan", "chameleon", "codeshell", "cogvlm", "cohere2moe",
    "dbrx", "deci", "deepseek", "dots1", "dream", "ernie4_5", "ernie4_5-moe", "exaone",
    "exaone-moe", "exaone4", "falcon", "granite", "granite_swa", "graniteswitch", "granitemoe",
    "grok", "grovemoe", "hunyuan-moe", "hunyuan_vl", "hy_v3", "internlm2", "jais2", "llada",
    "llada-moe", "llama", "llama4", "maincoder", "mellum", "minicpm", "mistral3", "olmo", "olmo2",
    "olmoe", "orion", "paddleocr", "pangu-embedded", "plamo", "pockettts", "qwen2", "qwen2moe",
    "qwen2vl", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe", "rnd1", "seed_oss", "smallthinker",
    "smollm3", "starcoder2", "talkie", "xverse",
})  # fmt: skip
# These assert no more than that keys and values are equally long.
_EQUAL_KV = _FULL_ROPE | {
    "afmoe", "bailingmoe2", "bert", "bitnet", "bloom", "chatglm", "cohere2", "command-r",
    "eurobert", "glm4moe", "glm4", "gpt2", "gptneox", "granitehybrid", "jais", "minimax-m2",
    "modern-bert", "mpt", "nanbeige", "nemotron_h_moe", "nemotron_h", "nemotron", "neo-bert",
    "openelm", "phi2", "phi3", "qwen", "qwen35", "qwen35moe", "qwen3next", "refact", "stablelm",
    "starcoder",
}  # fmt: skip
# Architectures that may leave out RoPE, so that their number of rotated dimensions means nothing.
_MAYBE_NO_ROPE = frozenset({
    "gpt2", "gptj", "mpt", "refact", "bloom", "mamba", "mamba2", "jamba", "jina-bert-v2", "t5",
    "t5encoder", "jais", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7", "wavtokenizer-dec", "nemotron_h",
    "nemotron_h_moe", "kimi-linear", "kimi-k3", "glm5-next", "bert", "nomic-bert", "granitehybrid",
})  # fmt: skip
# llama.cpp's own token ids for these where the file names none
_DEFAULT_BOS_EOS = {"gpt2": (11, 11), "llama": (1, 2), "gemma4": (-1, -1), "t5": (-1, 1)}

_AGAIN = "the file is damaged: download or convert it again"


@dataclasses.dataclass(frozen=True)
class Array:
    """A metadata array: its items where they are few numbers, else only how many there are."""

    item_type: int
    length: int
    items: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]  # ggml's order: the row length first
    type: int

    @property
    def size(self) -> int:
        """Weights."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        block, block_bytes = _TYPES[self.type]
        return self.size // block * block_bytes


@dataclasses.dataclass
class Header:
    """What precedes the weights of a GGUF file."""

    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    types: dict[str, int] = dataclasses.field(default_factory=dict)
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    tokens: list[bytes] = dataclasses.field(default_factory=list)
    length: int = 0  # bytes, without the padding before the weights

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """A hyperparameter of this architecture, without its prefix."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int = 0) -> int:
        """An integer hyperparameter; llama.cpp refuses other types politely."""
        value = self.get(key, default)
        return value if isinstance(value, int) else default

    def numbers(self, key: str) -> list[int]:
        """An integer hyperparameter that may be given once or for each layer."""
        value = self.get(key)
        if isinstance(value, Array):
            return [item for item in value.items if isinstance(item, int)]
        return [value] if isinstance(value, int) and not isinstance(value, bool) else []


class _Problem(Exception):
    """What is wrong and what to do, without the file's name."""

    def __init__(self, what: str, advice: str = _AGAIN) -> None:
        # Names from a damaged file may hold anything, and be of any length.
        text = "".join(char if char.isprintable() else "?" for char in what)
        super().__init__(f"{text if len(text) < 200 else text[:200] + '...'}; {advice}")


class _Reader:
    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data = data
        self._size = len(data)
        self.at = 0

    def number(self, fmt: str) -> Any:
        (value,) = struct.unpack_from("<" + fmt, self._data, self.at)
        self.at += struct.calcsize(fmt)
        return value

    def raw(self, what: str) -> bytes:
        length = self.number("Q")
        if length > self._size - self.at:
            raise _Problem(f"{what} is said to be {length} bytes long, beyond the end of the file")
        self.at += length
        return self._data[self.at - length : self.at]

    def text(self, what: str) -> str:
        return self.raw(what).decode("utf-8", "replace")

    def value(self, kind: int, key: str, header: Header) -> Any:
        if kind == _STRING:
            return self.text(f"the value of '{key}'")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise _Problem(f"'{key}' has the unknown type {kind}")
        item_type, count = self.number("I"), self.number("Q")
        if item_type == _STRING:
            self._strings(key, count, header)
            return Array(item_type, count)
        if item_type not in _SCALARS:
            raise _Problem(f"'{key}' is an array of the unknown type {item_type}")
        size = struct.calcsize(_SCALARS[item_type])
        if count > (self._size - self.at) // size:
            raise _Problem(f"'{key}' is said to have {count} items, beyond the end of the file")
        items: tuple[Any, ...] = ()
        if count <= _KEEP_ITEMS:
            items = struct.unpack_from(f"<{count}{_SCALARS[item_type]}", self._data, self.at)
        self.at += count * size
        return Array(item_type, count, items)

    def _strings(self, key: str, count: int, header: Header) -> None:
        """Skips, and keeps those of the vocabulary.  A hot loop: 300 000 times for a large one."""
        if count > (self._size - self.at) // 8:
            raise _Problem(f"'{key}' is said to have {count} strings, beyond the end of the file")
        if count > _MAX_STRINGS:
            raise _Problem(f"'{key}' has {count} strings, more than {_MAX_STRINGS}")
        data, at, unpack = self._data, self.at, struct.Struct("<Q").unpack_from
        if key == "tokenizer.ggml.tokens":
            add = header.tokens.append
            for _ in range(count):
                (length,) = unpack(data, at)
                at += 8
                add(data[at : at + length])
                at += length
        else:
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
        if at > self._size:
            raise _Problem(f"the strings of '{key}' reach beyond the end of the file")
        self.at = at


def _read_metadata(reader: _Reader, count: int, header: Header) -> None:
    for _ in range(count):
        key = reader.text("a metadata key")
        if not key or key in header.metadata:
            raise _Problem(f"the metadata key '{key}' is empty or given twice")
        header.types[key] = reader.number("I")
        header.metadata[key] = reader.value(header.types[key], key, header)


def _read_tensors(reader: _Reader, count: int, header: Header, size: int) -> None:
    alignment = 32
    if "general.alignment" in header.metadata:
        alignment = header.metadata["general.alignment"]
        if header.types["general.alignment"] != _U32 or alignment < 1 or alignment.bit_count() > 1:
            raise _Problem(f"general.alignment is {alignment}, not a power of two")
    start = end = 0  # of the last tensor, end without padding
    for _ in range(count):
        raw = reader.raw("a tensor's name")
        name = raw.decode("utf-8", "replace")
        if len(raw) > _MAX_NAME or name in header.tensors:
            raise _Problem(f"the tensor name '{name[:80]}' is too long or given twice")
        n_dims = reader.number("I")
        if n_dims > 4:
            raise _Problem(f"tensor '{name}' has {n_dims} dimensions")
        shape = tuple(reader.number("q") for _ in range(n_dims)) or (1,)
        kind, offset = reader.number("I"), reader.number("Q")
        if min(shape) < 1:
            raise _Problem(f"tensor '{name}' has the shape {list(shape)}")
        if kind not in _TYPES:
            raise _Problem(
                f"tensor '{name}' has the type {kind}, which llama.cpp does not know",
                "it may be newer than this swift-gguf or no longer supported: convert it again",
            )
        block, block_bytes = _TYPES[kind]
        if shape[0] % block:
            raise _Problem(f"tensor '{name}' has rows of {shape[0]}, not a multiple of {block}")
        start = end + -end % alignment
        if offset != start:
            raise _Problem(f"tensor '{name}' is at offset {offset} where {start} was expected")
        end = start + math.prod(shape) // block * block_bytes
        header.tensors[name] = Tensor(shape, kind)
    needed = reader.at + -reader.at % alignment + end
    if header.tensors and needed > size:
        raise _Problem(
            f"the file has {size} bytes where its tensors need {needed}",
            "it was cut short: download it again",
        )


def _read(data: mmap.mmap | bytes) -> Header:
    header, reader = Header(), _Reader(data)
    if data[:4] != b"GGUF":
        raise _Problem("this is not a GGUF file", "name a .gguf file, or convert the model first")
    try:
        reader.at = 4
        version = reader.number("I")
        if version not in (2, 3):
            raise _Problem(
                f"GGUF version {version} is not supported",
                "versions 2 and 3 are: convert the model again",
            )
        n_tensors, n_pairs = reader.number("q"), reader.number("q")
        for count, least, most, what in (
            (n_tensors, 24, _MAX_TENSORS, "tensors"),
            (n_pairs, 13, _MAX_PAIRS, "metadata keys"),
        ):
            if not 0 <= count <= len(data) // least:
                raise _Problem(
                    f"it claims to hold {count} {what}, more than fit into its {len(data)} bytes",
                    "it is damaged or was cut short: download it again",
                )
            if count > most:
                raise _Problem(f"it holds {count} {what}, more than {most}")
        _read_metadata(reader, n_pairs, header)
        _read_tensors(reader, n_tensors, header, len(data))
        header.length = reader.at
    except (struct.error, OverflowError):
        raise _Problem(
            "the file ends in the middle of its header", "it was cut short: download it again"
        ) from None
    return header


def _check_layers(header: Header) -> None:
    layers = header.integer("block_count")
    if not 1 <= layers <= _MAX_LAYERS:
        raise _Problem(f"it has {layers} layers, not 1 to {_MAX_LAYERS}")
    if header.integer("nextn_predict_layers") >= layers:
        raise _Problem(f"all of its {layers} layers are for multi-token prediction")
    for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon", "group_norm_epsilon"):
        epsilon = header.get(f"attention.{key}", 0.0)
        if isinstance(epsilon, float) and not 0 <= epsilon < math.inf:
            raise _Problem(f"attention.{key} is {epsilon}")
    scaling = header.get("rope.scaling.type", "none")
    if isinstance(scaling, str) and scaling not in _ROPE_SCALING:
        raise _Problem(
            f"its RoPE scaling '{scaling}' is unknown",
            f"llama.cpp knows {', '.join(_ROPE_SCALING)}: convert the model again",
        )


def _check_experts(header: Header) -> None:
    count, groups = header.integer("expert_count"), header.integer("expert_group_count")
    used = max(header.numbers("expert_used_count"), default=0)
    if header.architecture.startswith("hunyuan") and count <= 1:
        return  # llama.cpp takes those for dense models
    if not (0 <= count <= _MAX_EXPERTS and bool(count) == bool(used) and used <= count):
        raise _Problem(f"it uses {used} of {count} experts")
    if groups and groups >= count:
        raise _Problem(f"it has {groups} groups of {count} experts")
    if groups > 1:
        in_use = header.integer("expert_group_used_count")
        if count % groups or not 0 < in_use < groups:
            raise _Problem(f"it uses {in_use} of {groups} groups of {count} experts")


def _check_heads(header: Header) -> None:
    heads = header.numbers("attention.head_count")
    if not heads or not heads[0]:
        return  # no attention, or none in the first layer: llama.cpp derives nothing from it
    kv = header.numbers("attention.head_count_kv")
    if len(heads) == 1:
        heads *= max(1, len(kv))
    for query, shared in zip(heads, kv if len(kv) != 1 else kv * len(heads), strict=False):
        if shared and query % shared:
            raise _Problem(f"{query} attention heads cannot share {shared} key-value heads")
    width = header.integer("embedding_length")
    if width % heads[0] and header.get("attention.key_length") is None:
        raise _Problem(f"its width {width} is no multiple of its {heads[0]} attention heads")
    key = header.integer("attention.key_length", width // heads[0])
    value = header.integer("attention.value_length", width // heads[0])
    full = header.architecture in _FULL_ROPE
    if header.architecture in _EQUAL_KV and key != value:
        raise _Problem(f"its keys are {key} long and its values {value}")
    if header.architecture in _MAYBE_NO_ROPE:
        return
    for suffix in ("", "_swa"):
        length = header.integer(f"attention.key_length{suffix}", key)
        rotated = header.integer(f"rope.dimension_count{suffix}", length)
        if (
            rotated < 1
            or rotated % 2
            or rotated > length
            or (full and not suffix and rotated != length)
        ):
            raise _Problem(f"RoPE turns {rotated} of {length} dimensions of a head")


def _check_recurrent(header: Header) -> None:
    width, inner = header.integer("embedding_length"), header.integer("ssm.inner_size")
    if header.architecture in ("jamba", "granitehybrid") and inner != 2 * width:
        raise _Problem(f"its state is {inner} wide, not twice its width {width}")
    for key in ("ssm.conv_kernel", "ssm.time_step_rank", "shortconv.l_cache"):
        if header.integer(key, 1) == 0:
            raise _Problem(f"{key} is 0")


def _check_weights(header: Header) -> None:
    for name, tensor in header.tensors.items():
        if tensor.type and _ONLY_F32.search(name):
            raise _Problem(f"tensor '{name}' is not stored as F32, as llama.cpp needs it")
        if tensor.type in _NO_WEIGHTS and name.endswith(".weight"):
            raise _Problem(f"tensor '{name}' has the type {tensor.type}, which holds no weights")


def _check_tokenizer(header: Header) -> None:
    model = header.metadata.get("tokenizer.ggml.model")
    tokens = header.tokens
    if model is None or not tokens:
        raise _Problem(
            "it has no tokenizer",
            "convert the model again with its tokenizer files beside it",
        )
    if len(set(tokens)) != len(tokens):
        seen: set[bytes] = set()
        for token in tokens:
            if token and token in seen:  # empty ones get names from llama.cpp
                text = token.decode("utf-8", "replace")
                raise _Problem(f"its vocabulary has the token {text!r} twice")
            seen.add(token)
    embeddings = header.tensors.get("token_embd.weight")
    if embeddings and embeddings.shape[-1] != len(tokens):
        raise _Problem(
            f"its vocabulary has {len(tokens)} tokens and {embeddings.shape[-1]} embeddings",
            "convert the model again from matching files",
        )
    for index, what in enumerate(("bos", "eos")):
        token_id = header.metadata.get(f"tokenizer.ggml.{what}_token_id")
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            token_id = _DEFAULT_BOS_EOS.get(str(model), (-1, -1))[index]
        wanted = header.metadata.get(f"tokenizer.ggml.add_{what}_token", False)
        if wanted and not 0 <= token_id < len(tokens):
            raise _Problem(f"it adds a {what.upper()} token to each text and has none")
    if model == "llama":
        known = frozenset(tokens)
        for byte in range(256):
            # Text with an unknown character is spelled in bytes, by a lookup that must succeed.
            if b"<0x%02X>" % byte not in known and bytes([byte]) not in known:
                raise _Problem(f"its vocabulary lacks the byte token <0x{byte:02X}>")


def _check_splits(header: Header, path: Path) -> None:
    count = header.metadata.get("split.count", 0)
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not isinstance(count, int) or count < 2 or not match:
        return
    for number in range(2, count + 1):
        part = path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf")
        if not part.is_file():
            raise _Problem(f"its part {part.name} is missing", "download all parts into one folder")
        if read(part).types.get("split.no") != _U16:
            raise _Problem(f"its part {part.name} does not say which part it is")


def _map(path: Path) -> Header:
    if path.exists() and not path.is_file():
        raise OSError("not a regular file")  # opening a pipe would wait for ever
    with path.open("rb") as file:
        if file.seek(0, 2) < 24:  # mmap refuses empty files
            file.seek(0)
            return _read(file.read())
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(data)


def read(path: Path | str) -> Header:
    """The header of a GGUF file.  Raises ModelError where the file is not sound."""
    try:
        return _map(Path(path))
    except _Problem as problem:
        raise ModelError(f"{path}: {problem}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path}: cannot be read ({reason}); check the path") from None


def check(path: Path | str, *, tokenizer: bool = True) -> None:
    """Raise ModelError, in one line, if llama.cpp could not load this file or would crash on it.

    tokenizer=False allows models that come without a vocabulary.
    """
    header = read(path)
    try:
        if not header.architecture:
            raise _Problem("it does not name its architecture")
        if header.architecture == "clip":
            raise _Problem(
                "this is the vision part of a model", "name the language model's file instead"
            )
        _check_layers(header)
        _check_experts(header)
        _check_heads(header)
        _check_recurrent(header)
        _check_weights(header)
        if tokenizer:
            _check_tokenizer(header)
        _check_splits(header, Path(path))
    except _Problem as problem:
        raise ModelError(f"{path}: {problem}") from None
