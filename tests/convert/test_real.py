"""Real weights: SmolLM2 made a checkpoint again, and converted back."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from swift_gguf.convert.verify import TEXT, Comparison, compare, reference
from swift_gguf.engine import generate
from swift_gguf.hub import models
from swift_gguf.model.model import Model
from swift_gguf.native.convert import Quantization, quantize_file
from swift_gguf.sampling.sampling import Sampler, SamplingOptions
from swift_gguf.text.text import encode, render_chat
from tests.cli.conftest import cli  # noqa: F401
from tests.convert import checkpoints
from tests.convert.conftest import convert

pytestmark = pytest.mark.slow

# The model is sure of every token of its answers; elsewhere rounding may decide.
QUESTIONS = ("Write a Python function that adds two numbers.", "Name the four seasons of the year.")

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def original() -> Path:
    return models.resolve("smollm2-135m")


@pytest.fixture(scope="module")
def folder(
    original: Path, tokenizers: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    where = tmp_path_factory.mktemp("real") / "SmolLM2-135M-Instruct"
    return checkpoints.real(where, original, tokenizer=tokenizers("bpe"))


@pytest.fixture(scope="module")
def back(folder: Path) -> Path:
    """Converted back, in 32 bits: the weights are what Q4_1 left of them."""
    return convert(folder, folder.parent / "back.gguf", outtype="f32")


@pytest.fixture
def pair(original: Path, back: Path, open_model: Callable[..., Model]) -> tuple[Model, Model]:
    options = {"n_ctx": 512, "sidecar": None, "flash_attn": False, "exact_kv": True}
    return open_model(original, **options), open_model(back, **options)


def test_the_vocabulary_and_what_belongs_to_it_come_back(pair: tuple[Model, Model]) -> None:
    first, second = pair
    for key in ("model", "pre", "bos_token_id", "eos_token_id", "chat_template"):
        assert first.metadata(f"tokenizer.{key}") == second.metadata(f"tokenizer.{key}")
        name = f"tokenizer.ggml.{key}"
        assert first.metadata(name) == second.metadata(name), key
    for text in checkpoints.SAMPLE:
        assert encode(first, text) == encode(second, text)


def test_logits_and_text_come_back(pair: tuple[Model, Model]) -> None:
    """Not to the bit: with Q4_1 weights llama.cpp rounds activations to 8 bits, too."""
    tokens = encode(pair[0], TEXT)[:128]
    rows = []
    for model in pair:
        model.decode(tokens, n_outputs=64)
        rows.append(np.array([model.logits(row) for row in range(64)]))
    agreement = np.mean(rows[0].argmax(1) == rows[1].argmax(1))
    assert agreement >= 0.9
    assert np.corrcoef(rows[0].ravel(), rows[1].ravel())[0, 1] > 0.999
    for question in QUESTIONS:
        texts = []
        for model in pair:
            model.clear()
            prompt = encode(model, render_chat(model, [{"role": "user", "content": question}]))
            with Sampler(model, SamplingOptions(temperature=0)) as sampler:
                drawn = generate(model, prompt, sampler=sampler, max_tokens=16)
                texts.append([token.id for token in drawn])
        assert texts[0] == texts[1], question


def test_the_checkpoint_and_the_model_say_the_same(
    folder: Path, back: Path, tmp_path: Path
) -> None:
    theirs = reference(folder, n_tokens=160)
    exact = compare(back, theirs)
    # what is stored in 16 bits is computed in 32 by both
    assert exact.max_difference <= 2e-3
    assert exact.agreement == 1.0
    assert exact.same_tokens
    assert exact.perplexity == pytest.approx(exact.reference_perplexity, rel=1e-4)
    assert not exact.failures
    found: dict[str, Comparison] = {}
    for name in ("F16", "Q8_0", "Q6_K", "Q4_K_M", "Q2_K"):
        out = tmp_path / f"{name}.gguf"
        quantize_file(back, out, Quantization(name=name))
        found[name] = compare(out, theirs)
    assert not any(found[name].failures for name in ("F16", "Q8_0", "Q6_K", "Q4_K_M"))
    divergences = [comparison.divergence for comparison in found.values()]
    assert divergences == sorted(divergences)
    assert found["Q2_K"].perplexity > found["Q8_0"].perplexity


def test_damage_is_told_from_rounding(folder: Path, back: Path, tmp_path: Path) -> None:
    """One matrix of 210 is wrong before the model is quantised."""
    theirs = reference(folder, n_tokens=160)
    wrong = damaged(back, tmp_path / "wrong.gguf")
    for name in ("Q8_0", "Q4_K_M"):
        out = tmp_path / f"{name}.gguf"
        quantize_file(wrong, out, Quantization(name=name))
        found = compare(out, theirs)
        assert found.file_type == name
        assert len(found.failures) == 2, f"{name}: {found}"


def damaged(path: Path, out: Path) -> Path:
    """A matrix of one layer is turned around."""
    out.write_bytes(path.read_bytes())
    reader = GGUFReader(out, "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.12.ffn_down.weight")
    tensor.data[...] = tensor.data[::-1].copy()
    reader.data.flush()
    return out


def test_verify_tells_a_good_model_from_a_wrong_one(
    cli: Cli,  # noqa: F811
    folder: Path,
    back: Path,
    tmp_path: Path,
) -> None:
    wrong = damaged(back, tmp_path / "wrong.gguf")
    done = cli("verify", folder, back, wrong, "--tokens", "96", "--json")
    assert done.returncode == 1, done.stderr
    good, bad = json.loads(done.stdout)
    assert good["ok"]
    assert not bad["ok"]
    assert bad["max_difference"] > 100 * good["max_difference"]
    fine = cli("verify", folder, back, "-p", "The lighthouse keeper had counted the steps.")
    assert fine.returncode == 0, fine.stderr
    assert "ok for F32" in fine.stdout
