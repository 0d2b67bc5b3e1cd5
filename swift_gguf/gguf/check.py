"""Checks a GGUF file before llama.cpp loads it.

llama.cpp rejects most damaged files with an error.  But some files make it abort, which ends the
process, or loop forever.  `check` finds them by the header alone.  The rules come from assertions
in the pinned llama.cpp and from the limits of its CPU kernels.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from swift_gguf.errors import ModelError
from swift_gguf.gguf.header import F32, STRING, U16, Header, Problem, read

# Integers, F64, and block types for activations: no operation accepts them as weights.
_NO_WEIGHTS = frozenset({9, 15, 24, 25, 26, 27, 28})
# Operands of additions, scalings and convolutions: the CPU kernels accept only F32.
_ONLY_F32 = re.compile(r"norm(_\d)?\.weight$|\.bias$|\.ssm_(a|d|conv1d\.weight)$|shortconv\.conv\.")

_MAX_LAYERS = 512
_MAX_EXPERTS = 1024
_ROPE_SCALING = ("none", "linear", "yarn", "longrope")

# Architectures whose graphs assert that RoPE rotates the whole head (and what _EQUAL_KV says).
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
# These assert only that keys and values have the same length.
_EQUAL_KV = _FULL_ROPE | {
    "afmoe", "bailingmoe2", "bert", "bitnet", "bloom", "chatglm", "cohere2", "command-r",
    "eurobert", "glm4moe", "glm4", "gpt2", "gptneox", "granitehybrid", "jais", "minimax-m2",
    "modern-bert", "mpt", "nanbeige", "nemotron_h_moe", "nemotron_h", "nemotron", "neo-bert",
    "openelm", "phi2", "phi3", "qwen", "qwen35", "qwen35moe", "qwen3next", "refact", "stablelm",
    "starcoder",
}  # fmt: skip
# Architectures that may have no RoPE, so that the number of rotated dimensions is meaningless.
_MAYBE_NO_ROPE = frozenset({
    "gpt2", "gptj", "mpt", "refact", "bloom", "mamba", "mamba2", "jamba", "jina-bert-v2", "t5",
    "t5encoder", "jais", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7", "wavtokenizer-dec", "nemotron_h",
    "nemotron_h_moe", "kimi-linear", "kimi-k3", "glm5-next", "bert", "nomic-bert", "granitehybrid",
})  # fmt: skip
# llama.cpp's default token ids if the file has none
_DEFAULT_BOS_EOS = {"gpt2": (11, 11), "llama": (1, 2), "gemma4": (-1, -1), "t5": (-1, 1)}

_ADAPTER = {"general.architecture": STRING, "adapter.type": STRING, "adapter.lora.alpha": F32}


def _check_layers(header: Header) -> None:
    layers = header.integer("block_count")
    if not 1 <= layers <= _MAX_LAYERS:
        raise Problem(f"it has {layers} layers, not 1 to {_MAX_LAYERS}")
    if header.integer("nextn_predict_layers") >= layers:
        raise Problem(f"all of its {layers} layers are for multi-token prediction")
    for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon", "group_norm_epsilon"):
        epsilon = header.get(f"attention.{key}", 0.0)
        if isinstance(epsilon, float) and not 0 <= epsilon < math.inf:
            raise Problem(f"attention.{key} is {epsilon}")
    scaling = header.get("rope.scaling.type", "none")
    if isinstance(scaling, str) and scaling not in _ROPE_SCALING:
        raise Problem(
            f"its RoPE scaling '{scaling}' is unknown",
            f"llama.cpp knows {', '.join(_ROPE_SCALING)}: convert the model again",
        )


def _check_experts(header: Header) -> None:
    count, groups = header.integer("expert_count"), header.integer("expert_group_count")
    used = max(header.numbers("expert_used_count"), default=0)
    if header.architecture.startswith("hunyuan") and count <= 1:
        return  # llama.cpp takes those for dense models
    if not (0 <= count <= _MAX_EXPERTS and bool(count) == bool(used) and used <= count):
        raise Problem(f"it uses {used} of {count} experts")
    if groups and groups >= count:
        raise Problem(f"it has {groups} groups of {count} experts")
    if groups > 1:
        in_use = header.integer("expert_group_used_count")
        if count % groups or not 0 < in_use < groups:
            raise Problem(f"it uses {in_use} of {groups} groups of {count} experts")


def _check_heads(header: Header) -> None:
    heads = header.numbers("attention.head_count")
    if not heads or not heads[0]:
        return  # no attention, or none in the first layer: llama.cpp does not use the number
    kv = header.numbers("attention.head_count_kv")
    if len(heads) == 1:
        heads *= max(1, len(kv))
    for query, shared in zip(heads, kv if len(kv) != 1 else kv * len(heads), strict=False):
        if shared and query % shared:
            raise Problem(f"{query} attention heads cannot share {shared} key-value heads")
    width = header.integer("embedding_length")
    if width % heads[0] and header.get("attention.key_length") is None:
        raise Problem(f"its width {width} is not a multiple of its {heads[0]} attention heads")
    key = header.integer("attention.key_length", width // heads[0])
    value = header.integer("attention.value_length", width // heads[0])
    full = header.architecture in _FULL_ROPE
    if header.architecture in _EQUAL_KV and key != value:
        raise Problem(f"its keys have the length {key}, but its values have {value}")
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
            raise Problem(f"RoPE rotates {rotated} of {length} dimensions of a head")


def _check_recurrent(header: Header) -> None:
    width, inner = header.integer("embedding_length"), header.integer("ssm.inner_size")
    if header.architecture in ("jamba", "granitehybrid") and inner != 2 * width:
        raise Problem(f"its state has the width {inner}, not twice its embedding size {width}")
    for key in ("ssm.conv_kernel", "ssm.time_step_rank", "shortconv.l_cache"):
        if header.integer(key, 1) == 0:
            raise Problem(f"{key} is 0")


def _check_weights(header: Header) -> None:
    for name, tensor in header.tensors.items():
        if tensor.type and _ONLY_F32.search(name):
            raise Problem(f"tensor '{name}' is not F32, but llama.cpp needs F32 here")
        if tensor.type in _NO_WEIGHTS and name.endswith(".weight"):
            raise Problem(f"tensor '{name}' has the type {tensor.type}, which is not for weights")


def _check_tokenizer(header: Header) -> None:
    model = header.metadata.get("tokenizer.ggml.model")
    tokens = header.tokens
    if model is None or not tokens:
        raise Problem(
            "it has no tokenizer",
            "convert the model again with its tokenizer files beside it",
        )
    if len(set(tokens)) != len(tokens):
        seen: set[bytes] = set()
        for token in tokens:
            if token and token in seen:  # llama.cpp gives names to empty ones
                text = token.decode("utf-8", "replace")
                raise Problem(f"its vocabulary has the token {text!r} twice")
            seen.add(token)
    embeddings = header.tensors.get("token_embd.weight")
    if embeddings and embeddings.shape[-1] != len(tokens):
        raise Problem(
            f"its vocabulary has {len(tokens)} tokens but {embeddings.shape[-1]} embeddings",
            "convert the model again from matching files",
        )
    for index, what in enumerate(("bos", "eos")):
        token_id = header.metadata.get(f"tokenizer.ggml.{what}_token_id")
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            token_id = _DEFAULT_BOS_EOS.get(str(model), (-1, -1))[index]
        wanted = header.metadata.get(f"tokenizer.ggml.add_{what}_token", False)
        if wanted and not 0 <= token_id < len(tokens):
            raise Problem(f"it adds a {what.upper()} token to each text but has none")
    if model == "llama":
        known = frozenset(tokens)
        for byte in range(256):
            # llama.cpp writes unknown characters as byte tokens and aborts if one is missing
            if b"<0x%02X>" % byte not in known and bytes([byte]) not in known:
                raise Problem(f"its vocabulary lacks the byte token <0x{byte:02X}>")


def _check_splits(header: Header, path: Path) -> None:
    """Checks a split model: llama.cpp opens the first part and finds the others by its name."""
    count, number = header.metadata.get("split.count", 0), header.metadata.get("split.no", 0)
    if not isinstance(count, int) or count < 2:
        return
    match = re.fullmatch(r"(.*)-\d{5}-of-\d{5}\.gguf", path.name)
    name = match[1] if match else "NAME"
    first, *others = (f"{name}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1))
    if isinstance(number, int) and number > 0:
        raise Problem(f"it is part {number + 1} of {count} of a model", f"name the first, {first}")
    if header.n_after:
        raise Problem(
            f"the {count} parts of a model were concatenated, which does not give a model",
            f"keep them apart and name the first, {first}, or join them with llama-gguf-split "
            "--merge",
        )
    if path.name != first:
        raise Problem(
            f"it is the first of {count} parts of a model, and the others are found by its name",
            f"rename it to {first} (a link is enough), or join all with llama-gguf-split --merge",
        )
    for other in others:
        part = path.with_name(other)
        if not part.is_file():
            raise Problem(f"its part {part.name} is missing", "download all parts into one folder")
        if read(part).types.get("split.no") != U16:
            raise Problem(f"its part {part.name} does not say which part it is")


def check_adapter(path: Path | str) -> None:
    """Checks a LoRA adapter.

    Raises:
        ModelError: llama.cpp cannot read it.
    """
    header = read(path)
    try:
        if header.metadata.get("general.type") != "adapter":
            raise Problem(
                "this is not an adapter", "convert one with llama.cpp's convert_lora_to_gguf.py"
            )
        for key, kind in _ADAPTER.items():  # llama.cpp aborts on others
            if header.types.get(key, kind) != kind:
                raise Problem(f"its {key} has the wrong type")
    except Problem as problem:
        raise ModelError(f"{path}: {problem}") from None


def check(path: Path | str, *, tokenizer: bool = True) -> Header:
    """Checks a model file and returns its header.

    tokenizer: False accepts a model without a vocabulary.

    Raises:
        ModelError: llama.cpp cannot load this file, or would crash.
    """
    header = read(path)
    try:
        _check_splits(header, Path(path))  # parts after the first have only weights
        if not header.architecture:
            raise Problem("it does not name its architecture")
        if header.architecture == "clip":
            raise Problem(
                "this is the vision part of a model", "name the language model's file instead"
            )
        _check_layers(header)
        _check_experts(header)
        _check_heads(header)
        _check_recurrent(header)
        _check_weights(header)
        if tokenizer:
            _check_tokenizer(header)
    except Problem as problem:
        raise ModelError(f"{path}: {problem}") from None
    return header
