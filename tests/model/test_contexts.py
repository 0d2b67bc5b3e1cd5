"""Models with a table of positions never ask for one more, whatever the context is said to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.engine import generate
from swift_gguf.errors import ContextFullError
from swift_gguf.llama import Llama
from swift_gguf.model.model import Model
from swift_gguf.sampling.sampling import Sampler, SamplingOptions
from swift_gguf.speculation import Speculation, SpeculationOptions
from swift_gguf.stats import Stats
from tests.conftest import N_GPU_LAYERS
from tests.fixtures.tiny_gguf import write_tiny

N_POSITIONS = 200
PROMPT = [40, 41, 42, 40, 41]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("contexts") / "gpt2.gguf"
    return write_tiny(path, "gpt2", n_ctx=N_POSITIONS, quant="Q8_0")


@pytest.fixture
def open_swift(table: Path) -> Iterator[Callable[..., Llama]]:
    opened: list[Llama] = []

    def open_(**options: Any) -> Llama:
        options = {"n_gpu_layers": N_GPU_LAYERS, "verbose": False} | options
        opened.append(Llama(str(table), **options))
        return opened[-1]

    yield open_
    for llama in opened:
        llama.close()


def to_the_end(model: Model, speculation: Speculation | None = None) -> Stats:
    """An answer without a limit of its own; no token ends it."""
    stats = Stats()
    with Sampler(model, SamplingOptions(temperature=1, seed=1), prompt=PROMPT) as sampler:
        model.is_eog = lambda token: False  # type: ignore[method-assign]
        drafter = speculation.drafter if speculation else None
        for _ in generate(
            model, PROMPT, sampler=sampler, drafter=drafter, draft_max=16, stats=stats
        ):
            pass
    return stats


@pytest.mark.parametrize("n_ctx", [None, 0, 100, N_POSITIONS, 257, 1024])
def test_an_answer_ends_at_the_last_position(
    table: Path, open_model: Callable[..., Model], n_ctx: int | None
) -> None:
    model = open_model(table, n_ctx=n_ctx)
    assert model.n_ctx == N_POSITIONS
    stats = to_the_end(model)
    assert stats.stop_reason == "context"
    assert model.n_past == N_POSITIONS


@pytest.mark.parametrize("mode", ["ngram,recycling", "layer-skip"])
def test_so_do_drafts(table: Path, open_model: Callable[..., Model], mode: str) -> None:
    model = open_model(table, n_ctx=1024)
    speculation = Speculation(model, SpeculationOptions(mode=mode, fixed=True, draft_max=16))
    stats = to_the_end(model, speculation)
    assert stats.stop_reason == "context"
    assert stats.drafted > 100


def test_a_draft_model_with_fewer_positions_stops_drafting(
    table: Path, tmp_path: Path, open_model: Callable[..., Model]
) -> None:
    target = open_model(write_tiny(tmp_path / "llama.gguf", "llama", n_ctx=2048), n_ctx=512)
    options = SpeculationOptions(mode="draft-model", draft_model=table, fixed=True, draft_max=16)
    speculation = Speculation(target, options)
    try:
        stats = to_the_end(target, speculation)
    finally:
        speculation.close()
    assert stats.stop_reason == "context"
    assert 100 < stats.drafted < 16 * N_POSITIONS


def test_a_longer_prompt_does_not_fit(table: Path, open_model: Callable[..., Model]) -> None:
    model = open_model(table, n_ctx=1024)
    with pytest.raises(ContextFullError, match=f"the context of {N_POSITIONS}"):
        model.decode([40] * (N_POSITIONS + 1))


@pytest.mark.parametrize("n_ctx", [None, 0, 257, 1024])
def test_the_drop_in(open_swift: Callable[..., Llama], n_ctx: int | None) -> None:
    llama = open_swift(n_ctx=n_ctx)
    assert llama.n_ctx() == N_POSITIONS
    answer = llama.create_completion(PROMPT, max_tokens=None, logit_bias={257: -100.0}, seed=1)
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")
    assert answer["usage"]["total_tokens"] <= N_POSITIONS
    with pytest.raises(ValueError, match="exceed context window"):
        llama.create_completion([40] * (N_POSITIONS + 1))


@pytest.mark.parametrize("more", [{}, {"speculation": "off"}])
def test_embeddings(open_swift: Callable[..., Llama], more: dict[str, Any]) -> None:
    llama = open_swift(n_ctx=1024, embedding=True, **more)
    assert llama.embed("cat " * 400)


def test_what_llama_cpp_decodes_alone(open_swift: Callable[..., Llama]) -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    llama = open_swift(n_ctx=1024, draft_model=LlamaPromptLookupDecoding())
    answer = llama.create_completion(PROMPT, max_tokens=None, seed=1)
    assert answer["usage"]["total_tokens"] <= N_POSITIONS
