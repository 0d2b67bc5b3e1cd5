#!/usr/bin/env python3
"""Writes a llama model of random quantised weights: the shape and bytes of a real one, no download.

For measuring speed alone; its text is noise.  Blocks are drawn in their quantised form, one tensor
at a time, so a 7B model takes seconds and a few hundred megabytes of memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

# tests/ is not installed with the package
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.fixtures.tokenizer import CHATML, build_vocab

_UNUSED = 5  # llama.cpp's llama_token_type


@dataclass(frozen=True, kw_only=True)
class Shape:
    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_ctx: int = 4096


SHAPES = {
    "7b": Shape(n_vocab=32000, n_embd=4096, n_layer=32, n_head=32, n_head_kv=32, n_ff=11008),
    "1b": Shape(n_vocab=32000, n_embd=2048, n_layer=22, n_head=32, n_head_kv=4, n_ff=5632),
    "tiny": Shape(n_vocab=512, n_embd=256, n_layer=4, n_head=4, n_head_kv=2, n_ff=512, n_ctx=1024),
}


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """32 weights in a block: a 16-bit scale, then n_bytes of integers."""

    qtype: gguf.GGMLQuantizationType
    file_type: gguf.LlamaFileType
    n_bytes: int
    deviation: float
    """Of the integers, when every bit is drawn at random."""


BLOCK = 32
TYPES = {
    # 4-bit integers less 8
    "q4_0": BlockType(
        qtype=gguf.GGMLQuantizationType.Q4_0,
        file_type=gguf.LlamaFileType.MOSTLY_Q4_0,
        n_bytes=16,
        deviation=(8**2 / 3) ** 0.5,
    ),
    "q8_0": BlockType(
        qtype=gguf.GGMLQuantizationType.Q8_0,
        file_type=gguf.LlamaFileType.MOSTLY_Q8_0,
        n_bytes=32,
        deviation=(128**2 / 3) ** 0.5,
    ),
}


def random_blocks(
    rng: np.random.Generator, kind: BlockType, rows: int, columns: int, deviation: float
) -> NDArray[np.uint8]:
    """Blocks of a [rows, columns] matrix whose weights have about this standard deviation."""
    n_blocks = rows * columns // BLOCK
    blocks = np.empty((n_blocks, 2 + kind.n_bytes), np.uint8)
    # Scales of both signs: the integers' mean is not zero, and it would add up over a row.
    scales = rng.uniform(0.75, 1.25, n_blocks) * rng.choice([-1.0, 1.0], n_blocks)
    scales *= deviation / kind.deviation
    blocks[:, :2] = scales.astype("<f2").view(np.uint8).reshape(n_blocks, 2)
    blocks[:, 2:] = np.frombuffer(rng.bytes(n_blocks * kind.n_bytes), np.uint8).reshape(
        n_blocks, -1
    )
    return blocks.reshape(rows, -1)


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, shape (rows first) and standard deviation; norms have one dimension."""
    n_embd, n_kv = shape.n_embd, shape.n_embd // shape.n_head * shape.n_head_kv
    matrices = {
        "attn_q": (n_embd, n_embd),
        "attn_k": (n_kv, n_embd),
        "attn_v": (n_kv, n_embd),
        "attn_output": (n_embd, n_embd),
        "ffn_gate": (shape.n_ff, n_embd),
        "ffn_up": (shape.n_ff, n_embd),
        "ffn_down": (n_embd, shape.n_ff),
    }
    yield "token_embd.weight", (shape.n_vocab, n_embd), 1.0
    for layer in range(shape.n_layer):
        for norm in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{norm}.weight", (n_embd,), 0.1
        for name, (rows, columns) in matrices.items():
            yield f"blk.{layer}.{name}.weight", (rows, columns), columns**-0.5
    yield "output_norm.weight", (n_embd,), 0.1
    yield "output.weight", (shape.n_vocab, n_embd), 4 * n_embd**-0.5


def n_bytes(dims: tuple[int, ...], kind: BlockType) -> int:
    if len(dims) == 1:
        return 4 * dims[0]
    return dims[0] * dims[1] // BLOCK * (2 + kind.n_bytes)


def add_metadata(writer: gguf.GGUFWriter, name: str, shape: Shape, kind: BlockType) -> None:
    head_dim = shape.n_embd // shape.n_head
    writer.add_name(f"synthetic {name}")
    writer.add_file_type(kind.file_type)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    vocab = build_vocab()
    n_unused = shape.n_vocab - len(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*vocab.tokens, *(f"<|unused_{i}|>" for i in range(n_unused))])
    writer.add_token_types([*vocab.types, *[_UNUSED] * n_unused])
    writer.add_token_merges(list(vocab.merges))
    writer.add_bos_token_id(vocab.endoftext)
    writer.add_eos_token_id(vocab.im_end)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)


def write_synthetic(path: Path, *, name: str, type_name: str, seed: int = 0) -> None:
    """Writes a model of one of SHAPES in one of TYPES; the file appears when it is complete.

    Raises:
        OSError: no room, or no right to write there.
    """
    shape, kind = SHAPES[name], TYPES[type_name]
    needed = sum(n_bytes(dims, kind) for _, dims, _ in tensors(shape))
    path.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(path.parent).free) < needed + (64 << 20):
        raise OSError(f"{path.parent} has {free >> 20} MiB free, {needed >> 20} are needed")
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    try:
        add_metadata(writer, name, shape, kind)
        for tensor, dims, _ in tensors(shape):
            if len(dims) == 1:
                writer.add_tensor_info(tensor, dims, np.dtype(np.float32), 4 * dims[0])
            else:  # for quantised data the writer wants the shape in bytes
                size = n_bytes(dims, kind)
                row = (dims[0], size // dims[0])
                writer.add_tensor_info(tensor, row, np.dtype(np.uint8), size, raw_dtype=kind.qtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        rng = np.random.Generator(np.random.SFC64(seed))
        for _, dims, deviation in tensors(shape):
            data: NDArray[Any]
            if len(dims) == 1:
                data = (1 + deviation * rng.standard_normal(dims)).astype(np.float32)
            else:
                data = random_blocks(rng, kind, dims[0], dims[1], deviation)
            writer.write_tensor_data(data)
        writer.close()
        os.replace(partial, path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--type", choices=TYPES, default="q4_0")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        write_synthetic(args.out, name=args.shape, type_name=args.type, seed=args.seed)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
