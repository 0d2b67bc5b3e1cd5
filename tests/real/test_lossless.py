"""Speculation never changes the text, on real models."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from swift_gguf import engine
from swift_gguf.model.model import Model
from swift_gguf.native.binding import library
from swift_gguf.sampling.sampling import SamplingOptions
from swift_gguf.subnetwork import SubNetwork
from swift_gguf.text.text import encode
from tests.conftest import N_GPU_LAYERS
from tests.fixtures.controls import accept_drafts
from tests.real.prompts import PROMPTS
from tests.real.same_text import GREEDY, chat_tokens, decode, explain, light_skip, seeded

pytestmark = pytest.mark.slow

# On CPUs Q8_0 and Q4_1 are computed alike at every batch width, by llama.cpp itself.
INVARIANT = N_GPU_LAYERS == 0
# Others by the kernels in native/cpu.
NARROW_KERNELS = INVARIANT and platform.machine() in ("x86_64", "AMD64")


def assert_same(
    model: Model, prompts: list[str], sampling: Callable[[int], SamplingOptions]
) -> int:
    """Every prompt's text is plain's; the number of accepted draft tokens, to show it was tried."""
    subnetwork = light_skip(model)
    accepted = 0
    for i, text in enumerate(prompts):
        prompt = chat_tokens(model, text)
        plain, _ = decode(model, prompt, sampling=sampling(i))
        speculative, stats = decode(
            model,
            prompt,
            sampling=sampling(i),
            subnetwork=subnetwork,
            draft_max=1 + i % 7,
            p_min=0.5 if i % 5 else 0.0,  # mostly confident drafts, some that are mostly wrong
        )
        if INVARIANT or plain == speculative:
            assert speculative == plain, f"prompt {i}: {text}"
        elif sampling(i).temperature == 0:
            difference = explain(model, prompt, plain, speculative)
            assert difference is not None
            assert difference.is_near_tie, f"prompt {i}: {difference}"
        accepted += stats.accepted
    return accepted


@pytest.mark.parametrize("quant", [None, "Q8_0"], ids=["Q4_1", "Q8_0"])
@pytest.mark.parametrize(
    "half", [(PROMPTS[::2], lambda i: GREEDY), (PROMPTS[1::2], seeded)], ids=["greedy", "sampled"]
)
def test_fifty_prompts(
    real: Callable[..., Path],
    open_model: Callable[..., Model],
    quant: str | None,
    half: tuple[list[str], Callable[[int], SamplingOptions]],
) -> None:
    model = open_model(real("smollm2-135m", quant), n_ctx=1024)
    assert assert_same(model, *half) > 50


@pytest.mark.parametrize("quant", [None, "Q8_0"], ids=["Q4_1", "Q8_0"])
@pytest.mark.parametrize("tree", ["caterpillar", "best-first"])
def test_trees(
    real: Callable[..., Path], open_model: Callable[..., Model], quant: str | None, tree: str
) -> None:
    """Branches, greedy and sampled; several were accepted off the likeliest path."""
    model = open_model(real("smollm2-135m", quant), n_ctx=512)
    n_gaps = 0
    for i, text in enumerate(PROMPTS[::5]):
        prompt = chat_tokens(model, text)
        sampling = GREEDY if i % 2 else seeded(i)
        plain, _ = decode(model, prompt, sampling=sampling)
        options = {"subnetwork": light_skip(model), "draft_max": 4 + i, "p_min": 0.4, "tree": tree}
        drafted, _ = decode(model, prompt, sampling=sampling, **options)  # type: ignore[arg-type]
        if INVARIANT or plain == drafted:
            assert drafted == plain, f"prompt {i}: {text}"
        n_gaps += model.cells.n_parked
    assert n_gaps > 0  # an accepted sibling leaves gaps


def test_the_control_fails(
    real: Callable[..., Path], open_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verification that accepts everything changes texts: the comparison above can fail."""

    monkeypatch.setattr(engine, "choose", accept_drafts)
    model = open_model(real("smollm2-135m"), n_ctx=1024)
    with pytest.raises(AssertionError):
        assert_same(model, PROMPTS[:5], lambda i: GREEDY)


def test_long_context_and_bad_drafts(
    real: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    """Past 512 cells, where a kernel that splits its sums would differ by batch width."""
    model = open_model(real("smollm2-135m"), n_ctx=2048)
    prompt = chat_tokens(model, " ".join(PROMPTS * 2))
    assert len(prompt) > 512
    plain, _ = decode(model, prompt, max_tokens=64)
    for subnetwork in (light_skip(model), SubNetwork.uniform(model.n_layer)):
        speculative, stats = decode(model, prompt, subnetwork=subnetwork, max_tokens=64)
        assert stats.drafted > 0
        if INVARIANT:
            assert speculative == plain
        elif difference := explain(model, prompt, plain, speculative):
            assert difference.is_near_tie


def test_the_widest_draft(real: Callable[..., Path], open_model: Callable[..., Model]) -> None:
    """A verification of 65 rows, where flash attention would take its tiled kernel."""
    if not INVARIANT:
        pytest.skip("a property of the CPU kernels")
    model = open_model(real("smollm2-135m"), n_ctx=1024)
    prompt = chat_tokens(model, PROMPTS[0])
    plain, _ = decode(model, prompt, max_tokens=80)
    attention = SubNetwork(n_layer=model.n_layer, skip_attn=frozenset([4]))
    speculative, stats = decode(model, prompt, subnetwork=attention, max_tokens=80, draft_max=64)
    assert stats.drafted > 64
    assert speculative == plain


def test_sliding_window_past_512(
    real: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    """Gemma 3: rolled-back positions come back into windows that had moved on."""
    model = open_model(real("gemma3-270m", "Q8_0"), n_ctx=2048)
    prompt = encode(model, "The list goes on. ".join(PROMPTS))
    assert len(prompt) > 530
    plain, _ = decode(model, prompt, max_tokens=96)
    speculative, stats = decode(model, prompt, subnetwork=light_skip(model), max_tokens=96)
    assert stats.accepted > 5
    if INVARIANT:
        assert speculative == plain
    elif difference := explain(model, prompt, plain, speculative):
        assert difference.is_near_tie


@pytest.mark.parametrize("quant", [None, "Q4_0"], ids=["Q4_K_M", "Q4_0"])
def test_repacked_quantisations(
    real: Callable[..., Path],
    open_model: Callable[..., Model],
    record_property: Callable[..., None],
    quant: str | None,
) -> None:
    """Where llama.cpp's own kernels round differently at widths 4 and up, and ours do not."""
    model = open_model(real("qwen2.5-coder-1.5b", quant), n_ctx=1024)
    subnetwork = light_skip(model)
    diverged = accepted = 0
    for i, text in enumerate(PROMPTS[5:50:9]):
        prompt = chat_tokens(model, text)
        plain, _ = decode(model, prompt)
        speculative, stats = decode(model, prompt, subnetwork=subnetwork, draft_max=2 + 3 * i)
        accepted += stats.accepted
        if NARROW_KERNELS:
            assert speculative == plain, text
        elif difference := explain(model, prompt, plain, speculative):
            diverged += 1
            assert difference.is_near_tie, f"{text}: {difference}"
    record_property("diverged", diverged)
    assert accepted > 30


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("qwen2.5-coder-1.5b", None),
        ("qwen2.5-coder-1.5b", "Q4_0"),
        ("smollm2-135m", None),
        ("gemma3-270m", None),
    ],
    ids=["Q4_K_M", "Q4_0", "Q4_1", "mixed"],
)
def test_logits_do_not_depend_on_the_width(
    real: Callable[..., Path], open_model: Callable[..., Model], name: str, quant: str | None
) -> None:
    """To the bit: a token's logits alone, and in batches around every tile."""
    if not NARROW_KERNELS:
        pytest.skip("a property of the kernels for x86 with AVX2")
    model = open_model(real(name, quant), n_ctx=256)
    model.decode(encode(model, PROMPTS[0]), n_outputs=1)
    n_past, tokens = model.n_past, [1000 + 17 * i for i in range(48)]
    alone = []
    for token in tokens:
        model.decode([token], n_outputs=1)
        alone.append(logits(model, 0))
    for width in (2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 33, 48):
        model.rollback(n_past)
        model.decode(tokens[:width], n_outputs=width)
        for row in range(width):
            assert np.array_equal(logits(model, row), alone[row]), f"row {row} of {width}"


def logits(model: Model, row: int) -> NDArray[np.float32]:
    pointer = library().api.llama_get_logits_ith(model.ctx, row)
    return np.ctypeslib.as_array(pointer, (model.n_vocab,)).copy()
