"""Checkpoints as the Hub has them, made here: tiny random models, and a real one from its GGUF."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import transformers
from gguf import GGUFReader, dequantize

SAMPLE = (
    "The quick brown fox jumps over 1,234 lazy dogs.",
    "Größenwahn, naïveté, façade, œuvre.",
    "Съешь же ещё этих мягких французских булок.",
    "敏捷的棕色狐狸跳过了懒狗。",
    "素早い茶色の狐は怠け者の犬を飛び越える。",
    "빠른 갈색 여우가 게으른 개를 뛰어넘는다.",
    "كيف حالك اليوم يا صديقي؟",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "def f(x):\n\treturn {'a': x ** 2}  # why?\n\n",
    "  two spaces, three   spaces \n\n and emoji 🦊👩‍👩‍👧 don't we'll",
)
"""Texts in many scripts, which a tokenizer must read as its original does."""

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADDED = ("<|im_start|>", "<|im_end|>")

# family -> name in transformers, tokenizer, and what is its own
FAMILIES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "bpe", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "bpe", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen3moe": (
        "Qwen3Moe",
        "bpe",
        {
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
    "llama-spm": ("Llama", "spm", {"tie_word_embeddings": False}),
    "gemma3": (
        "Gemma3",
        "spm",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": (
        "Phi3",
        "spm-prefix",
        {"sliding_window": None, "pad_token_id": 0, "original_max_position_embeddings": 512},
    ),
    "mixtral": ("Mixtral", "spm", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
N_EMBD = {"bpe": 64, "qwen2": 64, "spm": 256, "spm-prefix": 256}
"""By tokenizer: real vocabularies make large matrices; k-quants need rows of 256."""
N_LAYER = 3
N_SPM = 600


def make(
    family: str,
    folder: Path,
    *,
    tokenizer: Path,
    shard_bytes: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    n_embd: int | None = None,
    n_layer: int = N_LAYER,
) -> Path:
    """A random model of a family with a tokenizer that `bpe_tokenizer` or `spm_tokenizer` wrote."""
    kind, reads, own = FAMILIES[family]
    n_vocab = json.loads((tokenizer / "vocab_size.json").read_text())
    width = n_embd or N_EMBD[reads]
    options = {
        "vocab_size": n_vocab,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": n_layer,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **own,
    }
    text = "Text" if kind == "Gemma3" else ""
    config = getattr(transformers, f"{kind}{text}Config")(**options)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():  # what is all ones and zeros would hide mistakes
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            parameter.data *= 2
    heads = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    for parameter in heads:
        # logits that tell tokens apart; Gemma's are large as they are, and its GELU is a table
        parameter.data *= 0.5 if kind == "Gemma3" else 2
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_bytes or "5GB")
    for file in tokenizer.iterdir():
        if file.name != "vocab_size.json":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bpe_tokenizer(folder: Path, gguf: Path, *, kind: str = "bpe") -> Path:
    """The BPE tokenizer of a GGUF, SmolLM2's (``bpe``) or Qwen2's (``qwen2``): the converter knows
    vocabularies by what they make of a text, so that a made-up one would be refused."""
    fields = GGUFReader(gguf).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    special = [i for i, kind in enumerate(types) if kind == 3]
    folder.mkdir(parents=True, exist_ok=True)
    added = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i in special
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    words: dict[str, Any] = {"type": "Digits", "individual_digits": True}
    if kind == "qwen2":
        pattern = {"Regex": QWEN2_WORDS}
        words = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    pieces = [words, {**byte_level, "use_regex": kind == "bpe"}]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if kind == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pieces},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    bos, eos = (
        tokens[fields[f"tokenizer.ggml.{name}_token_id"].contents()] for name in ("bos", "eos")
    )
    config = {
        "tokenizer_class": "Qwen2Tokenizer" if kind == "qwen2" else "GPT2TokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": tokens[0] if kind == "bpe" else None,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(row["id"]): row for row in added},
        "chat_template": fields["tokenizer.chat_template"].contents(),
    }
    for row in config["added_tokens_decoder"].values():
        row.pop("id")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "vocab_size.json").write_text(str(len(tokens)))
    return folder


def spm_tokenizer(folder: Path, *, prefix: bool = False, vocab_size: int = N_SPM) -> Path:
    """SentencePiece BPE with bytes, trained on a few sentences, with a chat's tokens added.

    prefix: put a space before every text, as Llama 2 and Phi 3 do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text("\n".join(SAMPLE * 4), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size - len(ADDED),
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    n_pieces = processor.vocab_size()
    added = {
        str(n_pieces + i): {
            "content": token,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
            "special": True,
        }
        for i, token in enumerate(ADDED)
    }
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": prefix,
        "legacy": False,
        "added_tokens_decoder": added,
        "chat_template": CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "vocab_size.json").write_text(str(n_pieces + len(ADDED)))
    return folder


def real(folder: Path, gguf: Path, *, tokenizer: Path, dtype: torch.dtype = torch.float16) -> Path:
    """A GGUF of the llama family as a checkpoint: its weights without their quantisation."""
    reader = GGUFReader(gguf)
    values = {name: field.contents() for name, field in reader.fields.items()}

    def get(key: str) -> Any:
        return values[f"llama.{key}"]

    n_heads, n_kv = get("attention.head_count"), get("attention.head_count_kv")
    config = transformers.LlamaConfig(
        vocab_size=len(values["tokenizer.ggml.tokens"]),
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv,
        max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": get("rope.freq_base")},
        bos_token_id=values["tokenizer.ggml.bos_token_id"],
        eos_token_id=values["tokenizer.ggml.eos_token_id"],
        tie_word_embeddings=True,
        dtype=str(dtype).removeprefix("torch."),
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state = {
        _hf_name(tensor.name): torch.from_numpy(
            _unpermuted(
                tensor.name, np.asarray(dequantize(tensor.data, tensor.tensor_type)), n_heads, n_kv
            )
        ).to(dtype)
        for tensor in reader.tensors
        if tensor.name != "rope_freqs.weight"
    }
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        if file.name != "vocab_size.json":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, part, suffix = name.split(".")
        return f"model.layers.{layer}.{_NAMES[part]}.{suffix}"
    known = {"token_embd": "embed_tokens", "output_norm": "norm"}
    return f"model.{known[name.removesuffix('.weight')]}.weight"


def _unpermuted(name: str, data: Any, n_heads: int, n_kv: int) -> Any:
    """llama.cpp turns pairs (2i, 2i + 1) of a head's dimensions, transformers (i, i + n/2)."""
    heads = {"attn_q.weight": n_heads, "attn_k.weight": n_kv}.get(".".join(name.split(".")[2:]))
    data = np.array(data, np.float32)
    if heads is None:
        return data
    rows, columns = data.shape
    split = data.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows, columns)
