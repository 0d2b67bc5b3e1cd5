"""Every combination of sources gives the text of plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.engine import generate
from swift_gguf.errors import ModelError, SwiftError
from swift_gguf.learning.profile import Store
from swift_gguf.model.model import Model
from swift_gguf.planning.planner import Planner
from swift_gguf.sampling.sampling import Sampler, SamplingOptions
from swift_gguf.speculation import SOURCES, Speculation, SpeculationOptions
from swift_gguf.stats import Stats
from tests.conftest import N_GPU_LAYERS
from tests.real.prompts import PROMPTS
from tests.real.same_text import GREEDY, chat_tokens, decode, light_skip, seeded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(N_GPU_LAYERS != 0, reason="a property of the CPU kernels"),
]

TEXTS = [
    PROMPTS[3],
    "Copy this twice: for i in range(10): print(i, i * i, i * i * i) # squares and cubes",
]
COMBINATIONS = [chosen for n in range(1, len(SOURCES) + 1) for chosen in combinations(SOURCES, n)]


@pytest.fixture
def model(real: Callable[..., Path], open_model: Callable[..., Model]) -> Model:
    return open_model(real("smollm2-135m", "Q8_0"), n_ctx=512)


@pytest.fixture
def speculate(
    model: Model, real: Callable[..., Path], tmp_path: Path
) -> Iterator[Callable[..., Speculation]]:
    """Speculation of some sources; another quantisation of the model is its draft model."""
    made: list[Speculation] = []

    def make(*sources: str, **options: Any) -> Speculation:
        if "draft-model" in sources:
            options["draft_model"] = real("smollm2-135m")
        if "layer-skip" in sources:
            light = light_skip(model)
            options |= {"skip_attn": light.skip_attn, "skip_ffn": light.skip_ffn}
        wanted = SpeculationOptions(mode=",".join(sources), **options)
        made.append(Speculation(model, wanted, store=Store(tmp_path)))
        return made[-1]

    yield make
    for speculation in made:
        speculation.close()


def answer(
    model: Model, speculation: Speculation, prompt: list[int], sampling: SamplingOptions
) -> tuple[list[int], Stats]:
    model.clear()
    stats = Stats()
    with Sampler(model, sampling, prompt=prompt) as sampler:
        tokens = generate(
            model,
            prompt,
            sampler=sampler,
            drafter=speculation.drafter,
            search=speculation.begin(len(prompt)),
            draft_max=speculation.draft_max,
            max_tokens=48,
            stats=stats,
        )
        return [token.id for token in tokens], stats


@pytest.fixture(scope="module")
def known() -> dict[str, list[int]]:
    """Plain decoding's answers, decoded once."""
    return {}


@pytest.mark.parametrize("sources", COMBINATIONS, ids="+".join)
def test_the_same_text(
    model: Model,
    speculate: Callable[..., Speculation],
    known: dict[str, list[int]],
    sources: tuple[str, ...],
) -> None:
    """Where drafts pay, and five tokens of them whether they do or not; greedy and sampled."""
    asked, used = set(), set()
    for options in ({}, {"fixed": True, "draft_max": 6, "tree": "best-first"}):
        speculation = speculate(*sources, **options)
        for text, sampling in zip(TEXTS, (seeded(1), GREEDY), strict=True):
            prompt = chat_tokens(model, text)
            if text not in known:
                known[text], _ = decode(model, prompt, sampling=sampling, max_tokens=48)
            tokens, stats = answer(model, speculation, prompt, sampling)
            assert tokens == known[text], f"{options}, {text}"
            used |= {name for name, source in stats.sources.items() if source.accepted}
        assert isinstance(speculation.drafter, Planner)
        calibration = speculation.drafter.economy.calibration
        asked |= {name for name in sources if calibration.evidence(name)}
    assert asked == set(sources)
    # of several that offer the same token one gets the credit, and times decide which
    assert used == set(sources) if len(sources) == 1 else used


def test_what_recycling_learned_is_there_in_the_next_run(
    model: Model, speculate: Callable[..., Speculation]
) -> None:
    prompt = chat_tokens(model, TEXTS[0])
    accepted = []
    for _ in range(2):
        speculation = speculate("recycling", fixed=True, draft_max=3)
        accepted.append(answer(model, speculation, prompt, GREEDY)[1].accepted)
        speculation.save()
    assert accepted[1] > 2 * accepted[0]


def test_a_draft_model_follows_an_edited_text(
    model: Model, speculate: Callable[..., Speculation]
) -> None:
    """Its context is cut back to what the two texts share, or cleared."""
    speculation = speculate("draft-model", fixed=True, draft_max=4)
    for text in (TEXTS[0], TEXTS[0][:20], TEXTS[1], TEXTS[0]):
        prompt = chat_tokens(model, text)
        plain, _ = decode(model, prompt, max_tokens=48)
        tokens, stats = answer(model, speculation, prompt, GREEDY)
        assert tokens == plain
        assert stats.accepted > stats.drafted / 2  # the same model, rounded otherwise


def test_another_family_cannot_draft(model: Model, real: Callable[..., Path]) -> None:
    options = SpeculationOptions(draft_model=real("gemma3-270m"))
    with pytest.raises(ModelError, match=r"cannot draft for this model: .*; use a smaller model"):
        closing(Speculation(model, options))
    with pytest.raises(SwiftError, match="needs --draft-model PATH"):
        SpeculationOptions(mode="draft-model")
