"""Measuring with little time, on a busy machine, or until somebody wants an end."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from swift_gguf.errors import StoppedError
from swift_gguf.gguf.sidecar import Sidecar
from swift_gguf.learning.learning import QUICK_WIDTHS
from swift_gguf.learning.profile import Profile
from swift_gguf.model.model import Model
from swift_gguf.planning.cost import Costs, CostsHere
from swift_gguf.planning.measuring import Measurement
from swift_gguf.planning.waiting import waited_s
from swift_gguf.subnetwork import SubNetwork
from tests.unit.planning.test_cost import PASS_MS, SOME, TEXT, TimedModel, budget, measured

SIDECAR = Sidecar(path=Path("x"), n_narrow=(8, 0, 8), n_head=100)


def hurried(model: TimedModel, seconds: float = math.inf, *, known: Costs | None = None) -> Costs:
    """As before the first prompt."""
    model.stop_s = model.now_s + seconds
    measurement = Measurement(cast(Model, model), widths=QUICK_WIDTHS, known=known)
    measurement.run(budget(model, seconds), rounds=2)
    assert model.tokens == TEXT
    return measurement.costs()


def calm(**options: Any) -> TimedModel:
    model = TimedModel(**options)
    model.sidecar = SIDECAR
    return model


def widths(costs: Costs) -> list[int]:
    return [width for width, _ in costs.pass_ms]


# -- little time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0, 100.0])
def test_it_ends_in_time_and_is_whole(factor: float) -> None:
    for seconds in (0.0, 0.01, 0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0):
        model = calm(noise=lambda: factor)
        costs = hurried(model, seconds)
        assert model.now_s <= seconds + 1e-9
        assert costs.n_layer == 3
        everything = SubNetwork(n_layer=3, skip_attn=frozenset(range(3)), draft_head=True)
        assert costs.draft_ms(everything) <= costs.verify_ms(1)
        for width in (1, 2, 5, 30):
            assert 0 < costs.verify_ms(width) < math.inf
        assert Costs.from_dict(costs.as_dict()) == costs
        assert costs.is_sure == (factor <= 1.0 and not costs.untimed and not costs.is_provisional)


def test_the_most_telling_passes_come_first() -> None:
    n_passes, found = 0, []
    for ms in itertools.count(1, 25):
        model = calm()
        costs = hurried(model, ms / 1e3)
        if len(model.passes) > n_passes:
            n_passes = len(model.passes)
            found.append((widths(costs), costs.untimed))
        if not costs.untimed and 3 in widths(costs):
            break
    everything = ("passes", "rows", "sidecar", "sub-layers", "switch")
    assert found[0] == ([1], everything)  # guessed by its bytes: the pass was stopped
    seen = [each for each, _ in found]
    assert [each for each, _ in itertools.groupby(seen)] == [
        [1], [1, 2], [1, 2, 8], [1, 2, 6, 8], [1, 2, 4, 6, 8], [1, 2, 3, 4, 6, 8],
    ]  # fmt: skip
    assert found[seen.index([1, 2, 6, 8])][1] == ("rows", "sub-layers", "switch")


def test_what_there_was_no_time_for_is_taken_from_the_bytes_or_the_widths_beside() -> None:
    costs = hurried(calm(), 0.7)
    assert widths(costs) == [1, 2, 8]
    assert costs.verify_ms(5) == pytest.approx((PASS_MS[2] + PASS_MS[8]) / 2)
    assert costs.is_provisional
    # by the bytes a pass over attention and FFN reads 30 of 110 parts, attention a third of them
    assert sum(costs.attention_ms) + sum(costs.ffn_ms) == pytest.approx(95 * 30 / 110)
    assert sum(costs.attention_ms) == pytest.approx(95 * 10 / 110)
    assert (costs.row_ms, costs.switch_ms) == (0, 0)


def test_several_tokens_cost_as_many_passes_until_more_is_known() -> None:
    for seconds in (0.01, 0.2):
        costs = hurried(TimedModel(), seconds)
        assert costs.is_guess
        assert costs.verify_ms(3) == pytest.approx(3 * costs.verify_ms(1))
    assert not hurried(TimedModel(), 0.5).is_guess


def test_the_next_time_goes_on_where_this_one_ended() -> None:
    costs, looks = hurried(calm(), 0.7), 1
    while not costs.is_sure:
        before = costs
        costs = hurried(calm(), 0.7, known=costs)
        assert set(widths(before)) <= set(widths(costs))
        looks += 1
    assert looks <= 5
    everything = hurried(calm())
    assert dict(costs.pass_ms) == pytest.approx(dict(everything.pass_ms))
    assert costs.narrow_ms == pytest.approx(everything.narrow_ms)
    assert costs.ffn_ms == pytest.approx(everything.ffn_ms)


def test_of_two_looks_the_faster_times_count_and_two_are_enough() -> None:
    one_round_s = 2.3
    first = hurried(calm(noise=lambda: 1.04), one_round_s)
    assert not first.untimed
    assert first.is_provisional
    both = hurried(calm(), one_round_s, known=first)
    assert both.is_sure
    assert dict(both.pass_ms) == pytest.approx({w: PASS_MS[w] for w in QUICK_WIDTHS})
    slower = hurried(calm(noise=lambda: 1.2), one_round_s, known=first)
    assert dict(slower.pass_ms) == pytest.approx(dict(first.pass_ms))


def test_a_quiet_machine_needs_two_or_three_rounds() -> None:
    n_rounds = []
    for seed in range(40):
        rng = random.Random(seed)

        def noise(rng: random.Random = rng) -> float:
            hiccup = 3.0 if rng.random() < 0.01 else 1.0
            return hiccup * math.exp(abs(rng.gauss(0, 0.015)))

        model = TimedModel(noise=noise)
        assert hurried(model).is_sure
        n_rounds.append(sum(width == 3 for width, _ in model.passes))
    assert max(n_rounds) <= 4
    assert sum(n_rounds) / len(n_rounds) < 3


def test_a_stop_by_somebody_else_is_one() -> None:
    model = TimedModel(stop_s=0.3)
    measurement = Measurement(cast(Model, model), widths=QUICK_WIDTHS)
    with pytest.raises(StoppedError):
        measurement.run(budget(model, 2.0), rounds=2)
    assert widths(measurement.costs()) == [1]  # what was timed is not lost
    assert model.tokens == TEXT


# -- a busy machine --------------------------------------------------------------------------------


def test_passes_that_waited_for_a_cpu_are_marked() -> None:
    assert not hurried(TimedModel(waiting=lambda: 0.05)).is_busy
    assert hurried(TimedModel(waiting=lambda: 0.5)).is_busy
    assert hurried(TimedModel(waiting=lambda: 0.5), 0.2).is_busy
    assert not hurried(TimedModel(), 0.0).is_busy


def test_a_busy_spell_does_not_count_if_every_pass_was_met_without() -> None:
    loads = iter([1.0] * 12)  # the first passes wait as long as they run
    load = 0.0

    def noise() -> float:
        nonlocal load
        load = next(loads, 0.0)
        return 1 + load

    costs = hurried(TimedModel(noise=noise, waiting=lambda: load))
    assert not costs.is_busy
    assert dict(costs.pass_ms) == pytest.approx({w: PASS_MS[w] for w in QUICK_WIDTHS})


def test_nothing_is_built_on_a_busy_look() -> None:
    busy = hurried(TimedModel(waiting=lambda: 0.5, noise=lambda: 0.5))
    assert busy.is_busy
    quiet = hurried(TimedModel(), known=busy)
    assert quiet.is_sure
    assert dict(quiet.pass_ms) == pytest.approx({w: PASS_MS[w] for w in QUICK_WIDTHS})


def profile(costs: Costs) -> Profile:
    return Profile(
        fingerprint="0" * 32, model="m", n_layer=SOME.n_layer, costs={"here": costs.as_dict()}
    )


def test_what_is_trusted_less_never_replaces_what_is_trusted_more() -> None:
    kinds = [
        replace(SOME, is_busy=True, is_provisional=True, row_ms=0.0),
        replace(SOME, is_provisional=True, row_ms=1.0),
        replace(SOME, row_ms=2.0),
    ]
    for stored, learned in itertools.product(kinds, repeat=2):
        merged = profile(stored).merged(profile(learned)).costs["here"]
        assert merged == max(stored, learned, key=lambda costs: costs.trust).as_dict()
    again = replace(kinds[2], row_ms=3.0)
    assert profile(kinds[2]).merged(profile(again)).costs["here"] == again.as_dict()


def test_what_is_corrected_under_load_is_not_kept() -> None:
    costs = replace(SOME, kv_ms=(0.0, 0.0))

    def run(slower: Callable[[int], float]) -> Costs:
        here = CostsHere(cast(Any, TimedModel()), costs)
        for _ in range(300):
            for width in (1, 2, 1, 4):
                here.observe(width, costs.verify_ms(width) * slower(width))
        return here.refreshed()

    assert run(lambda width: 1.0 if width == 1 else 1.3) != costs
    assert run(lambda width: 2.0 if width == 1 else 4.0) == costs


def test_how_long_threads_waited(tmp_path: Path) -> None:
    for task, text in (("1", "5 2500000000 7\n"), ("2", "1 500000000 1\n"), ("3", ""), ("4", "x")):
        (tmp_path / task).mkdir()
        (tmp_path / task / "schedstat").write_text(text)
    (tmp_path / "5").mkdir()  # it has ended
    assert waited_s(tmp_path) == pytest.approx(3.0)
    assert waited_s() <= waited_s()


def test_elsewhere_it_is_told_by_how_often_they_had_to_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert waited_s() <= waited_s()
    assert measured(TimedModel()).is_sure
