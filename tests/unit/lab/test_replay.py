"""Replays of recorded answers: the planner's own code on costs that do not waver."""

from __future__ import annotations

import json
import random

import pytest

from lab.replay import Recording, Replay, compare
from swift_gguf.bench.modes import AUTO, Mode
from swift_gguf.planning.cost import Costs


def costs(**passes: float) -> Costs:
    points = tuple((int(width[1:]), ms) for width, ms in passes.items())
    return Costs(
        pass_ms=points, attention_ms=(1.0,), ffn_ms=(1.0,), kv_ms=(0.0,), head_ms=1.0, n_kv=64
    )


CHEAP = costs(w1=10.0, w2=11.0, w4=13.0, w8=17.0, w16=25.0)
DEAR = costs(w1=10.0, w2=20.0, w4=40.0, w8=80.0, w16=160.0)


def recording(prompt: list[int], answer: list[int], *, category: str = "text") -> Recording:
    """At whose every position the target is sure of what it says."""
    rows = [((token,), (0.9,)) for token in [*answer, 0]]
    return Recording(
        category=category, prompt=tuple(prompt), answer=tuple(answer), likeliest=tuple(rows)
    )


def copied(n: int = 120) -> Recording:
    text = [7 * i % 1009 for i in range(n)]
    return recording([*text, 5000], text, category="copied")


def novel(n: int = 120, seed: int = 0) -> Recording:
    rng = random.Random(seed)
    return recording([1, 2, 3], [rng.randrange(10**6) for _ in range(n)], category="novel")


def test_a_copied_answer_gains_where_width_is_cheap() -> None:
    line = compare([copied()], CHEAP)[0]
    assert line.auto > 2.5
    assert line.best_name.startswith("ngram")
    assert line.auto / line.best > 0.85


def test_a_novel_answer_loses_next_to_nothing() -> None:
    for prices in (CHEAP, DEAR):
        line = compare([novel()], prices)[0]
        assert 0.97 < line.auto <= 1.0
        assert (line.best_name, line.best) == ("plain", 1.0)


def test_categories_are_told_apart_and_all_is_by_time() -> None:
    lines = {line.category: line for line in compare([copied(), novel()], CHEAP)}
    assert set(lines) == {"copied", "novel", "all"}
    assert lines["novel"].auto < lines["all"].auto < lines["copied"].auto
    both = 2 / (1 / lines["copied"].auto + 1 / lines["novel"].auto)
    assert lines["all"].auto == pytest.approx(both, rel=0.02)


def test_what_a_mode_learns_it_keeps_unless_it_is_cold() -> None:
    again = [recording([1, 2, 3], [9 * i % 401 for i in range(60)]) for _ in range(3)]
    warm, cold = (compare(again, CHEAP, cold=cold)[-1].auto for cold in (False, True))
    assert warm > cold + 0.1


def test_time_is_that_of_the_passes() -> None:
    text = copied(41)
    assert Replay(Mode(AUTO), DEAR).play(novel(41)) >= 40 * 10.0
    # after the pending token, drafts of three are all right: the fourth token is the target's own
    ms = Replay(Mode("ngram", 3), CHEAP).play(text)
    assert 40 / 4 * 13.0 <= ms < 40 / 4 * 13.0 + 3 * 10.0


def test_wrong_drafts_are_paid_for() -> None:
    text = [i % 7 for i in range(40)]
    prompt = [*text, 99]
    wrong = [*text[:20], *(1000 + i for i in range(20))]  # leaves what it copies midway
    ms = Replay(Mode("ngram", 3), DEAR).play(recording(prompt, wrong))
    assert ms > Replay(Mode("ngram", 3), DEAR).play(recording(prompt, text))


def test_recordings_survive_json() -> None:
    text = copied(8)
    assert Recording.from_dict(json.loads(json.dumps(text.as_dict()))) == text


def test_a_recording_needs_a_row_for_every_position() -> None:
    with pytest.raises(ValueError, match="2 rows for 2 tokens"):
        Recording(
            category="", prompt=(1,), answer=(2, 3), likeliest=(((1,), (1.0,)), ((2,), (1.0,)))
        )
