"""Draft weights that are no numbers, or make none: told in one line, and the target never hears."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from swift_gguf import Llama
from swift_gguf.drafting.passes import Passes
from swift_gguf.errors import NotFiniteError, SidecarError, SpoiledError
from swift_gguf.gguf import sidecar as sidecars
from swift_gguf.learning.learning import space_of
from swift_gguf.model.model import Model
from swift_gguf.sampling.sampling import SamplingOptions
from swift_gguf.search.drivers import OnTheFly
from swift_gguf.session import Session
from swift_gguf.speculation import Speculation, SpeculationOptions
from tests.prepare.test_sidecar import SMALL, narrow, prepared

Opener = Callable[..., Model]
PROMPT = [(7 * i) % 250 + 5 for i in range(90)]
GREEDY = SamplingOptions(temperature=0.0)
LARGEST = np.float16(65504)


@pytest.fixture
def pair(tiny: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A model of the test's own and the sidecar beside it, whose weights are Q4_0."""
    model = tmp_path / "model.gguf"
    shutil.copy(tiny("llama", quant="Q8_0"), model)
    return model, prepared(model, sidecars.path_beside(model), replace(SMALL, kind="Q4_0"))


def scale(path: Path, tensor: str, value: np.float16) -> None:
    """Every block of a Q4_0 matrix gets this scale."""
    reader = gguf.GGUFReader(path, "r+")
    (found,) = (each for each in reader.tensors if each.name == tensor)
    found.data.reshape(-1, 18)[:, :2] = np.frombuffer(value.tobytes(), np.uint8)
    found.data.flush()


def logits_after(model: Model, prompt: list[int]) -> np.ndarray:
    model.clear()
    model.decode(prompt)
    return np.asarray(model.logits(0))


def answer(model: Model, session: Session | None) -> str:
    """Of a session, or plainly."""
    session = session or Session(model, None)
    return "".join(piece.text for piece in session.answer(PROMPT, GREEDY, max_tokens=24))


@pytest.mark.parametrize("tensor", ["blk.0.attn_v", "blk.1.ffn_down", "output"])
@pytest.mark.parametrize("value", [np.float16(np.inf), np.float16(np.nan)])
def test_weights_that_are_no_numbers_are_refused(
    pair: tuple[Path, Path],
    open_model: Opener,
    tensor: str,
    value: np.float16,
    capfd: pytest.CaptureFixture[str],
) -> None:
    scale(pair[1], f"{tensor}.weight", value)
    model = open_model(pair[0], sidecar=pair[1])
    with pytest.raises(SidecarError, match=rf"{tensor}\.weight has numbers that are not finite"):
        model.decode(PROMPT, subnetwork=narrow(model))
    found = open_model(pair[0])
    space = space_of(found)
    assert space is not None
    assert not space.is_narrow
    assert "not finite" in str(found.sidecar_refusal)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("clears", [True, False])
def test_what_a_draft_spoils_is_cleared(
    pair: tuple[Path, Path], open_model: Opener, monkeypatch: pytest.MonkeyPatch, clears: bool
) -> None:
    """Values too large for the cache's type.

    Without clearing, and with llama.cpp's attention, the control, the target says NaN.  Our
    attention leaves masked cells out.
    """
    scale(pair[1], "blk.0.attn_v.weight", LARGEST)
    model = open_model(pair[0], sidecar=pair[1])
    before = logits_after(model, PROMPT[:80])
    model.decode(PROMPT[80:])
    model.decode_tree([5, 6, 7], [-1, 0, 1], subnetwork=narrow(model))
    if not clears:
        never = property(lambda _: False, lambda *_: None)
        monkeypatch.setattr(type(model.cells), "spoiled", never, raising=False)
        model._at_every_width = False
    with pytest.raises(SpoiledError, match=r"model\.swift\.gguf or of the model are damaged"):
        model.top(0)
    model.rollback(len(PROMPT))
    assert (model.tokens == []) == clears
    after = logits_after(model, PROMPT[:80])
    assert np.array_equal(after, before) == clears
    assert np.isnan(after).any() != clears


@pytest.mark.parametrize("mode", ["auto", "layer-skip", "ngram,layer-skip"])
def test_a_sidecar_that_makes_no_numbers_is_left_aside_when_it_is_measured(
    pair: tuple[Path, Path], open_model: Opener, mode: str
) -> None:
    scale(pair[1], "blk.0.attn_v.weight", LARGEST)
    model = open_model(pair[0])
    plain = answer(model, None)
    with Session(model, Speculation(model, SpeculationOptions(mode=mode))) as session:
        assert "not finite" in str(model.sidecar_refusal)
        assert answer(model, session) == plain
    with pytest.raises(SidecarError, match="not finite"):
        Speculation(open_model(pair[0], sidecar=pair[1]), SpeculationOptions(mode=mode))


def test_an_answer_ends_and_the_next_one_goes_without(
    pair: tuple[Path, Path], open_model: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft that overflows only later."""
    model = open_model(pair[0])
    plain = answer(model, None)
    top = model.top
    with Session(model, Speculation(model, SpeculationOptions(mode="layer-skip"))) as session:

        def overflowing(row: int, k: int = 1) -> tuple[list[int], list[float]]:
            if model._is_draft and len(model.tokens) > len(PROMPT) + 4:
                raise model._spoiled()
            return top(row, k)

        monkeypatch.setattr(model, "top", overflowing)
        with pytest.raises(SpoiledError, match="not finite"):
            answer(model, session)
        assert model.tokens == []
        assert answer(model, session) == plain
        assert answer(model, session) == plain


def test_a_search_beside_an_answer_ends_it(pair: tuple[Path, Path], open_model: Opener) -> None:
    """The text is gone with the cache: what would go on without it is another one."""

    class Spoiling:
        done = False

        def step(self, window: object) -> None:
            raise SpoiledError("gone")

    search = OnTheFly(Spoiling(), lambda: object(), cost_s=lambda: 0.0, share=1.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(SpoiledError):
        search.step(1.0)
    search.step(1.0)  # it has ended


def test_another_model_that_is_damaged_drafts_nothing(
    pair: tuple[Path, Path], open_model: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its context is its own: the target's text goes on."""
    from swift_gguf.drafting.tree import ROOT, Tree

    model = open_model(pair[0])
    model.decode(PROMPT)
    passes = Passes("draft-model", model)

    def top(row: int, k: int) -> None:
        raise NotFiniteError("no numbers")

    monkeypatch.setattr(model, "top", top)
    passes.begin(5)
    assert passes.offers(Tree(), ROOT, 1) == []
    passes.end()
    assert passes.is_broken


def test_a_llama_goes_on_without(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """llama_cpp's account of the context follows."""
    llama = Llama(
        str(pair[0]), speculation="layer-skip", n_threads=1, n_gpu_layers=0, verbose=False
    )

    def completed() -> str:
        text: str = llama.create_completion(PROMPT, max_tokens=24, temperature=0.0)["choices"][0][
            "text"
        ]
        return text

    before = completed()
    assert llama.speculation.stats.drafted > 0
    model = llama._adopted
    assert model is not None
    top, failures = model.top, iter([True])

    def overflowing(row: int, k: int = 1) -> tuple[list[int], list[float]]:
        if model._is_draft and next(failures, False):
            raise model._spoiled()
        return top(row, k)

    monkeypatch.setattr(model, "top", overflowing)
    with pytest.raises(SpoiledError):
        completed()
    assert completed() == before
    assert llama.speculation.stats.drafted == 0
    llama.close()
