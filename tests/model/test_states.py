"""States of contexts in files: to the bit, for every kind of memory, and never a damaged one."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.errors import StateError, UnsupportedModelError
from swift_gguf.llama import Llama
from swift_gguf.model import Model
from swift_gguf.sampling import SamplingOptions
from swift_gguf.session import Answer, Session
from swift_gguf.speculation import Speculation, SpeculationOptions
from tests.conftest import N_GPU_LAYERS
from tests.fixtures.tiny_gguf import ALL_FAMILIES, NO_ROLLBACK_FAMILIES
from tests.real.conftest import real as real

OpenModel = Callable[..., Model]
TEXT = [5 + i * 7 % 200 for i in range(90)]
NEXT = [9, 8, 7, 60]
FREE = ("off", "auto")


def saved(model: Model, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    assert model.save_state(file, **options) == len(file.getvalue())
    return file


def rows(model: Model, tokens: list[int]) -> list[list[float]]:
    """Logits after each token, decoded one by one."""
    made = []
    for token in tokens:
        model.decode([token])
        made.append(model.logits(0).tolist())
    return made


def answer(model: Model, prompt: list[int], *, mode: str = "off", n: int = 24) -> Answer:
    speculation = Speculation(model, SpeculationOptions(mode=mode, fixed=mode not in FREE))
    with Session(model, speculation) as session:
        made = session.answer(prompt, SamplingOptions(temperature=0.9, seed=3), max_tokens=n)
        list(made)
        return made


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_context_goes_on_to_the_bit(
    family: str, flash_attn: bool, tiny: Callable[..., Path], open_model: OpenModel
) -> None:
    """Sliding windows, running states, learned positions; in this and in another context."""
    path = tiny(family, quant="Q8_0")
    model, other = (open_model(path, flash_attn=flash_attn) for _ in range(2))
    rows(model, TEXT)
    file = saved(model, notes={"first": 1})
    expected = rows(model, NEXT)
    other.decode([3] * 40)
    for again in (model, other):
        assert again.load_state(file) == {"first": 1}
        assert again.tokens == TEXT
        assert not again.is_fresh
        assert rows(again, NEXT) == expected


@pytest.mark.parametrize(
    "family", [family for family in ALL_FAMILIES if family not in NO_ROLLBACK_FAMILIES]
)
def test_a_restored_context_can_be_rolled_back(
    family: str, tiny: Callable[..., Path], open_model: OpenModel
) -> None:
    """Further than a sliding window reaches, and to where a part of it was saved."""
    path = tiny(family, quant="Q8_0")
    model, plain = open_model(path), open_model(path)
    rows(model, TEXT)
    for n in (70, 33, 1):
        rows(plain, TEXT[:n])
        expected = rows(plain, NEXT)
        plain.clear()
        model.load_state(saved(model, n_tokens=len(TEXT)))
        part = saved(model, n_tokens=n)
        model.rollback(n)
        assert rows(model, NEXT) == expected
        model.load_state(part)
        assert model.tokens == TEXT[:n]
        assert rows(model, NEXT) == expected
        model.clear()
        rows(model, TEXT)


@pytest.mark.parametrize("family", NO_ROLLBACK_FAMILIES)
def test_a_running_state_is_saved_whole_or_not_at_all(
    family: str, tiny: Callable[..., Path], open_model: OpenModel
) -> None:
    model = open_model(tiny(family))
    rows(model, TEXT)
    with pytest.raises(UnsupportedModelError, match="no state of less"):
        saved(model, n_tokens=50)
    assert model.tokens == TEXT


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_drafts_before_and_after_change_no_text(
    family: str, tiny: Callable[..., Path], open_model: OpenModel
) -> None:
    """Trees leave gaps between the cells of a text; a restored one has none."""
    path = tiny(family, quant="Q8_0", noop_ffn=(1,))
    plain, swift, fresh = (open_model(path, flash_attn=True) for _ in range(3))
    mode = "ngram,layer-skip"
    texts = [TEXT]
    for _ in range(2):
        said = answer(plain, texts[-1]).tokens
        assert answer(swift, texts[-1], mode=mode).tokens == said
        texts.append([*texts[-1], *said, *NEXT])
        plain.decode(texts[-1][plain.n_past :])
        swift.decode(texts[-1][swift.n_past :])
        texts[-1] += NEXT
        plain.decode(NEXT)
        swift.decode_tree([1, NEXT[0], *NEXT[1:]], [-1, -1, 1, 2, 3])
        swift.keep([1, 2, 3, 4])
    assert swift.cells.n_parked > 0, "there is nothing to test"
    texts[-1] += NEXT
    expected = answer(plain, texts[-1]).tokens
    file = saved(swift)
    for again in (swift, fresh):
        again.load_state(file)
        made = answer(again, texts[-1], mode=mode)
        assert made.tokens == expected
        assert made.stats.prompt_n == len(NEXT)
        assert made.stats.drafted > 0


F32, F16, Q8_0 = 0, 1, 8


@pytest.fixture
def llama(real: Callable[..., Path]) -> Iterator[Callable[..., Model]]:
    """`llama(type_k, type_v)`: a model whose cache has these types."""
    opened = []

    def open_(type_k: int, type_v: int) -> Model:
        opened.append(
            Llama(
                str(real("smollm2-135m")),
                n_ctx=256,
                type_k=type_k,
                type_v=type_v,
                flash_attn=True,
                n_gpu_layers=N_GPU_LAYERS,
                speculation="off",
                verbose=False,
            )
        )
        model = opened[-1].speculation.model
        assert model is not None
        return model

    yield open_
    for each in opened:
        each.close()


@pytest.mark.slow
@pytest.mark.parametrize(("k", "v"), [(F32, F32), (Q8_0, Q8_0), (Q8_0, F16)])
def test_other_types_of_keys_and_values(llama: Callable[..., Model], k: int, v: int) -> None:
    model, other = llama(k, v), llama(k, v)
    rows(model, TEXT)
    file = saved(model)
    expected = rows(model, NEXT)
    other.load_state(file)
    assert rows(other, NEXT) == expected
    halves = llama(F16, F16)
    halves.decode(TEXT[:30])
    with pytest.raises(StateError):  # llama.cpp knows the types
        halves.load_state(file)
    assert halves.tokens == []
    assert len(rows(halves, NEXT)) == len(NEXT)


# -- what does not fit, and what is damaged --------------------------------------------------------


def test_another_model_another_context_another_library(
    tiny: Callable[..., Path], open_model: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama", quant="Q8_0")
    model = open_model(path)
    model.decode(TEXT)
    file = saved(model)
    for other, why in (
        (open_model(tiny("llama", quant="Q8_0", seed=1)), "another changed, weights"),
        (open_model(path, n_ctx=512), "another n_ctx"),
        (open_model(path, exact_kv=True), "another exact_kv"),
        (open_model(path, flash_attn=False), "another flash_attn"),
    ):
        other.decode(NEXT)
        with pytest.raises(StateError, match=why):
            other.load_state(file)
        assert other.tokens == NEXT, "what the context had is lost"
    monkeypatch.setattr(model._library, "build", "another")
    with pytest.raises(StateError, match="another library"):
        model.load_state(file)


def test_a_touched_model_file_is_another_one(
    tiny: Callable[..., Path], open_model: OpenModel, tmp_path: Path
) -> None:
    """Its weights are only sampled."""
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny("llama", quant="Q8_0").read_bytes())
    model = open_model(path)
    model.decode(TEXT)
    file = saved(model)
    model.load_state(file)
    os.utime(path, ns=(1, 1))
    with pytest.raises(StateError, match="another changed"):
        model.load_state(file)


@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2"])
def test_damaged_states_are_refused_and_the_model_goes_on(
    family: str, tiny: Callable[..., Path], open_model: OpenModel
) -> None:
    model, rng = open_model(tiny(family, quant="Q8_0"), n_ctx=128), random.Random(family)
    expected = rows(model, NEXT)
    model.clear()
    model.decode(TEXT)
    good = saved(model).getvalue()
    for case in range(200):
        damaged = bytearray(good)
        if case % 4 == 0:
            del damaged[rng.randrange(len(good)) :]
        elif case % 4 == 1:
            start = rng.randrange(len(good))
            damaged[start : start + 64] = rng.randbytes(64)
        else:
            for _ in range(rng.choice([1, 3, 50])):
                damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        with pytest.raises(StateError):
            model.load_state(io.BytesIO(bytes(damaged)))
        if case % 20 == 0:
            model.clear()
            assert rows(model, NEXT) == expected
    model.load_state(io.BytesIO(good))
    assert model.tokens == TEXT


def test_what_llama_cpp_refuses_is_refused(
    tiny: Callable[..., Path], open_model: OpenModel
) -> None:
    """A state with right checksums that is no state."""
    from swift_gguf.model import state

    model = open_model(tiny("llama", quant="Q8_0"))
    for piece in (b"", b"\0" * 8, b"\1" + b"\0" * 7, b"\xff" * 400):
        file = io.BytesIO()
        state.write(file, model._identity(), TEXT, [(len(TEXT), piece)])
        with pytest.raises(StateError, match="restore cells"):
            model.load_state(file)
        assert model.tokens == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_models(name: str, real: Callable[..., Path], open_model: OpenModel) -> None:
    """Longer than Gemma's window of 512; an answer with drafts follows."""
    path = real(name)
    model, other = open_model(path, n_ctx=1024), open_model(path, n_ctx=1024)
    text = [1000 + i * 7 % 150 for i in range(700)]
    said = answer(model, text, mode="auto", n=16).tokens
    file = saved(model)
    prompt = [*text, *said, *NEXT]
    expected = answer(model, prompt).tokens
    other.load_state(file)
    assert other.tokens[:700] == text
    made = answer(other, prompt, mode="auto")
    assert made.tokens == expected
    assert made.stats.prompt_n == len(NEXT) + 1
    other.load_state(file)
    for each in (model, other):
        each.rollback(90)
    assert answer(other, text[:100]).tokens == answer(model, text[:100]).tokens
