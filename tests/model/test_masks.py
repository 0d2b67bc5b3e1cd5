"""Any sub-network is safe on every family of architectures."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swift_gguf.drafting import LayerSkip
from swift_gguf.engine import generate
from swift_gguf.errors import DecodeError, UnsupportedModelError
from swift_gguf.model.model import Model
from swift_gguf.native.binding import library
from swift_gguf.sampling.sampling import Sampler, SamplingOptions
from swift_gguf.stats import Stats
from swift_gguf.subnetwork import SubNetwork
from tests.fixtures.tiny_gguf import (
    FAMILIES,
    FFN_WITHOUT_HELPER,
    NO_ROLLBACK_FAMILIES,
    write_tiny,
)

PROMPT = list(range(5, 25))


def draft(
    model: Model, subnetwork: SubNetwork, token: int, *, n_max: int, p_min: float = 0.0
) -> tuple[list[int], list[float]]:
    """swift_gguf_draft, the drafting loop for C programs."""
    handle = library().subnetwork(subnetwork)
    return library().draft(model.ctx, handle, token, model.n_past, n_max=n_max, p_min=p_min)


def random_subnetworks(n_layer: int, count: int, seed: int) -> list[SubNetwork]:
    rng = random.Random(seed)

    def some() -> frozenset[int]:
        return frozenset(i for i in range(n_layer) if rng.random() < 0.5)

    every = frozenset(range(n_layer))
    extremes = [
        (frozenset(), frozenset()),
        (every, every),
        (every, frozenset()),
        (frozenset(), every),
    ]
    chosen = extremes + [(some(), some()) for _ in range(count)]
    return [SubNetwork(n_layer=n_layer, skip_attn=a, skip_ffn=f) for a, f in chosen]


@pytest.mark.parametrize("flash_attn", [True, False], ids=["flash", "no flash"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mask_runs_and_leaves_no_trace(
    family: str, flash_attn: bool, tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    """Wide and narrow passes, drafts and costs, under masks from none to all."""
    model = open_model(tiny(family), flash_attn=flash_attn)
    model.decode(PROMPT)
    before = model.logits(0)
    for i, subnetwork in enumerate(random_subnetworks(model.n_layer, 30, seed=len(family))):
        width = 1 + i % 5
        model.decode(PROMPT[:width], n_outputs=1 + i % width, subnetwork=subnetwork)
        assert np.isfinite(model.logits(0)).all()
        model.rollback(len(PROMPT))
        tokens, probabilities = draft(model, subnetwork, 7, n_max=4)
        assert len(tokens) == len(probabilities) > 0
        assert all(0 < p <= 1 for p in probabilities)
        assert model.pass_cost(subnetwork, n_tokens=width).n_nodes > 0
    # the whole model again, from the same cells: exactly as if nothing had happened
    model.rollback(len(PROMPT) - 1)
    model.decode(PROMPT[-1:])
    alone = model.logits(0)
    model.clear()
    model.decode(PROMPT[:-1])
    model.decode(PROMPT[-1:])
    np.testing.assert_array_equal(model.logits(0), alone)
    assert alone.argmax() == before.argmax()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_reported_skippable_is_skipped(
    family: str, tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    model = open_model(tiny(family))
    model.decode(PROMPT[:-1])
    model.decode(PROMPT[-1:])
    whole = model.logits(0)
    attention, ffn = model.sublayers
    full = model.pass_cost()
    for layer in range(model.n_layer):
        for kind, sublayer in (("skip_attn", attention[layer]), ("skip_ffn", ffn[layer])):
            skipped_one: dict[str, Any] = {kind: frozenset([layer])}
            subnetwork = SubNetwork(n_layer=model.n_layer, **skipped_one)
            model.rollback(len(PROMPT) - 1)
            model.decode(PROMPT[-1:], subnetwork=subnetwork)
            skipped = not np.array_equal(model.logits(0), whole)
            unshared = kind == "skip_ffn" and family in FFN_WITHOUT_HELPER
            assert skipped == (sublayer.status == "ok") == (not unshared)
            saved = full.weight_bytes - model.pass_cost(subnetwork).weight_bytes
            assert saved == sublayer.weight_bytes
            assert (saved > 0) == skipped


def test_costs_add_up_to_the_tensors(
    tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    """A pass of an untied F32 model reads every weight once, but of the embedding only one row."""
    model = open_model(tiny("llama"))
    embedding = 4 * 64 * model.n_vocab
    cost = model.pass_cost(n_kv=0)
    assert cost.weight_bytes == model.n_bytes - embedding + 4 * 64
    assert cost.head_bytes == embedding
    assert cost.kv_bytes == 0
    # K and V, four layers, two heads of 16, F16
    assert model.pass_cost(n_kv=10).kv_bytes == 10 * 2 * 4 * 2 * 16 * 2
    assert model.pass_cost(n_tokens=3, n_outputs=1).weight_bytes == cost.weight_bytes + 2 * 4 * 64
    everything = frozenset(range(model.n_layer))
    nothing = SubNetwork(n_layer=model.n_layer, skip_attn=everything, skip_ffn=everything)
    left = model.pass_cost(nothing, n_kv=10)
    assert left.weight_bytes == left.head_bytes + 4 * 64 + 4 * 64  # head, one row, final norm
    assert left.kv_bytes == 0


def test_the_head_is_found_behind_a_softcap(
    tiny: Callable[..., Path], open_model: Callable[..., Model], tmp_path: Path
) -> None:
    """Gemma-like models scale and cap what the output projection gives."""
    plain = open_model(tiny("gemma3")).pass_cost(n_kv=0)
    capped = write_tiny(tmp_path / "capped.gguf", "gemma3", softcap=30.0)
    cost = open_model(capped).pass_cost(n_kv=0)
    assert cost.head_bytes == plain.head_bytes > 0
    assert cost.n_nodes > plain.n_nodes


def test_experts_count_as_far_as_they_run(
    tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    model = open_model(tiny("qwen3moe"))
    _, ffn = model.sublayers
    experts = 2 * 3 * 64 * 32 * 4  # two of eight, three matrices each
    router_and_norm = 64 * 8 * 4 + 64 * 4
    assert ffn[0].weight_bytes == experts + router_and_norm


def test_planted_no_ops_are_accepted_always(
    tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    """Skipping sub-layers that add nothing drafts what the target says: acceptance is 1."""
    for family in ("llama", "gemma3", "qwen3moe"):
        planted = {"noop_attn": (1, 2), "noop_ffn": (0, 3)}
        model = open_model(tiny(family, **planted))
        subnetwork = SubNetwork(
            n_layer=model.n_layer, skip_attn=frozenset((1, 2)), skip_ffn=frozenset((0, 3))
        )
        stats = Stats()
        with Sampler(model, SamplingOptions(temperature=0)) as sampler:
            drafter = LayerSkip(model, subnetwork)
            tokens = list(
                generate(
                    model, PROMPT, sampler=sampler, drafter=drafter, max_tokens=60, stats=stats
                )
            )
        assert len(tokens) > 5
        assert stats.drafted > 0
        assert stats.accepted == stats.drafted


@pytest.mark.parametrize("family", NO_ROLLBACK_FAMILIES)
def test_models_without_rollback_are_refused(
    family: str, tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    model = open_model(tiny(family))
    assert model.rollback_refusal
    subnetwork = SubNetwork(n_layer=model.n_layer, skip_ffn=frozenset([1]))
    with pytest.raises(UnsupportedModelError, match="speculation off"):
        model.decode([5], subnetwork=subnetwork)
    with pytest.raises(UnsupportedModelError):
        draft(model, subnetwork, 5, n_max=2)
    # and plain decoding works
    with Sampler(model, SamplingOptions(temperature=0)) as sampler:
        assert len(list(generate(model, PROMPT, sampler=sampler, max_tokens=10))) > 0


class Interrupted:
    """A sampler that is interrupted at its third token."""

    def __init__(self, sampler: Sampler) -> None:
        self.left, self.sampler = 3, sampler

    def sample(self, model: Model, row: int) -> int:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.sampler.sample(model, row)


@pytest.mark.parametrize("family", NO_ROLLBACK_FAMILIES)
def test_an_interrupt_leaves_a_usable_context_where_nothing_can_be_taken_back(
    family: str, tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    model = open_model(tiny(family))
    with Sampler(model, SamplingOptions(temperature=0)) as sampler:
        plain = [t.id for t in generate(model, PROMPT, sampler=sampler, max_tokens=10)]
        with pytest.raises(KeyboardInterrupt):
            list(generate(model, PROMPT, sampler=Interrupted(sampler), max_tokens=10))
        assert model.tokens == []
        again = [t.id for t in generate(model, PROMPT, sampler=sampler, max_tokens=10)]
    assert again == plain


def test_draft_stops(tiny: Callable[..., Path], open_model: Callable[..., Model]) -> None:
    model = open_model(tiny("llama"))
    model.decode(PROMPT)
    subnetwork = SubNetwork(n_layer=model.n_layer)
    tokens, probabilities = draft(model, subnetwork, 7, n_max=12)
    assert len(tokens) == 12 or model.is_eog(tokens[-1])
    threshold = sorted(probabilities)[len(probabilities) // 2]
    first_below = next((i for i, p in enumerate(probabilities) if p < threshold), len(tokens))
    fewer, _ = draft(model, subnetwork, 7, n_max=12, p_min=threshold)
    assert fewer == tokens[:first_below]
    assert draft(model, subnetwork, 7, n_max=0) == ([], [])
    assert model.n_past == len(PROMPT)
    # the whole model as its own drafter says what the whole model says
    model.decode([7])
    likeliest, known = model.top(0, 5)
    assert likeliest[0] == tokens[0]
    assert known[0] == pytest.approx(probabilities[0], rel=1e-5)
    logits = model.logits(0).astype(np.float64)
    exact = np.exp(logits - logits.max())
    exact /= exact.sum()
    assert likeliest == list(np.argsort(-exact, kind="stable")[:5])
    assert known == pytest.approx(list(exact[likeliest]), rel=1e-4)
    assert len(model.top(0, model.n_vocab + 10)[0]) == model.n_vocab


def test_bad_arguments_are_errors_not_crashes(
    tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    model = open_model(tiny("llama"))
    model.decode(PROMPT)
    subnetwork = SubNetwork(n_layer=model.n_layer)
    with pytest.raises(DecodeError):
        draft(model, subnetwork, 7, n_max=model.n_ctx)  # past the end of the context
    handle = library().subnetwork(subnetwork)
    for pos in (0, len(PROMPT) - 1, len(PROMPT) + 1, 2**31 - 2):  # would remove or miss positions
        with pytest.raises(DecodeError, match="out of range"):
            library().draft(model.ctx, handle, 7, pos, n_max=3, p_min=0.0)
    with pytest.raises(DecodeError):
        draft(model, subnetwork, model.n_vocab + 5, n_max=2)  # no such token
    with pytest.raises(DecodeError):
        model.pass_cost(n_tokens=0)
    with pytest.raises(DecodeError):
        model.decode([model.n_vocab])
    assert model.tokens == PROMPT
    swift = library()._swift
    assert swift.swift_gguf_set_subnetwork(None, None) == -1
    assert swift.swift_gguf_subnetwork_init(None, None, -1, None, False) is None
    assert swift.swift_gguf_subnetwork_init(None, None, 1 << 30, None, False) is None
    assert swift.swift_gguf_struct_size(b"nonsense") == 0
    assert swift.swift_gguf_rollback_refusal(None)
    swift.swift_gguf_subnetwork_free(None)


def test_a_shorter_mask_skips_nothing_beyond_it(
    tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    model = open_model(tiny("llama"))
    model.decode(PROMPT)
    model.decode([3], subnetwork=SubNetwork(n_layer=2, skip_ffn=frozenset([1])))
    assert np.isfinite(model.logits(0)).all()


def test_draft_survives_a_failing_decode(
    tiny: Callable[..., Path], open_model: Callable[..., Model]
) -> None:
    """After an error the sub-network is off again and the context is as it was."""
    model = open_model(tiny("llama"))
    model.decode(PROMPT[:-1])
    model.decode(PROMPT[-1:])
    whole = model.logits(0)
    every = frozenset(range(model.n_layer))
    nothing = SubNetwork(n_layer=model.n_layer, skip_attn=every, skip_ffn=every)
    with pytest.raises(DecodeError):
        draft(model, nothing, -5, n_max=2)
    model.rollback(len(PROMPT) - 1)
    model.decode(PROMPT[-1:])
    np.testing.assert_array_equal(model.logits(0), whole)
