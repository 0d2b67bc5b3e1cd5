"""What `swift-gguf bench` lets its contenders know, on a generated model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from swift_gguf.bench.contenders import opened
from swift_gguf.bench.modes import parse_modes
from swift_gguf.gguf.identity import profile_key
from swift_gguf.learning.profile import Store
from swift_gguf.model.model import Model
from swift_gguf.sampling.sampling import SamplingOptions
from swift_gguf.session import Session
from swift_gguf.speculation import Speculation, SpeculationOptions

PROMPT = list(range(5, 40))
GREEDY = SamplingOptions(temperature=0.0)


def test_a_bench_remembers_no_earlier_answers_and_teaches_nobody(
    tiny: Callable[..., Path],
    open_model: Callable[..., Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SWIFT_GGUF_PROFILES", str(tmp_path))
    model = open_model(tiny("llama", quant="Q8_0"), n_threads=1)
    options = SpeculationOptions(mode="recycling", fixed=True, draft_max=2)

    def in_a_session() -> int:
        with Session(model, Speculation(model, options)) as session:
            answer = session.answer(PROMPT, GREEDY, max_tokens=32)
            list(answer)
            session.save()
            return answer.stats.accepted

    first, again = in_a_session(), in_a_session()
    assert again > first  # the table is worth something
    known = Store().load(profile_key(model.path, None))
    assert known is not None
    assert known.recycling

    def in_a_bench(*, cold: bool) -> int:
        modes = parse_modes("recycling:2")
        with opened(model, modes, GREEDY, cold=cold) as contenders:
            (ours,) = (contenders[mode.name] for mode in modes if mode.sources)
            return ours.answer(PROMPT, max_tokens=32).stats.accepted

    assert in_a_bench(cold=False) == in_a_bench(cold=True) == in_a_bench(cold=False) < again
    assert Store().load(profile_key(model.path, None)) == known
