"""Measuring with little time, on a busy machine, or until somebody wants an end."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from swift_gguf.errors import StoppedError
from swift_gguf.gguf.sidecar import Sidecar
from swift_gguf.learning.learning import QUICK_WIDTHS
from swift_gguf.learning.profile import Profile
from swift_gguf.model.model import Model
from swift_gguf.planning.cost import Costs, CostsHere
from swift_gguf.planning.measuring import MORE, Measurement, estimated
from swift_gguf.planning.waiting import waited_s
from swift_gguf.subnetwork import SubNetwork
from tests.unit.planning.test_cost import (
    PASS_MS,
    SOME,
    TEXT,
    TimedModel,
    budget,
    measured,
    sublayer,
)

SIDECAR = Sidecar(path=Path("x"), n_narrow=(8, 0, 8), n_head=100)


def hurried(model: TimedModel, seconds: float = math.inf, *, known: Costs | None = None) -> Costs:
    """As in idle time."""
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


def test_what_several_tokens_cost_is_estimated_until_one_such_pass_was_timed() -> None:
    for seconds in (0.01, 0.2):
        costs = hurried(TimedModel(), seconds)
        assert widths(costs) == [1]
        assert costs.verify_ms(3) == pytest.approx((1 + 2 * MORE) * costs.verify_ms(1))
        assert costs.is_estimate == (seconds < 0.1)
    assert widths(hurried(TimedModel(), 0.5)) == [1, 2]


# -- estimates -------------------------------------------------------------------------------------


def test_estimates_run_no_pass_and_grow_with_the_width() -> None:
    model = calm()
    costs = estimated(cast(Model, model))
    assert model.passes == []
    assert costs.is_estimate
    assert not costs.is_sure
    assert costs.untimed == ("passes", "rows", "sidecar", "sub-layers", "switch")
    by_width = [costs.verify_ms(width) for width in range(1, 40)]
    assert by_width == sorted(by_width)
    # careful: most machines need less, and no machine needs more than a pass a token
    assert by_width[1] / by_width[0] == pytest.approx(1.5)
    # relative to a pass, by bytes: 100 of the weights, 10 of the cache
    everything = SubNetwork(n_layer=3, skip_attn=frozenset(range(3)), skip_ffn=frozenset(range(3)))
    assert costs.draft_ms(everything) / by_width[0] == pytest.approx(80 / 110)


@pytest.mark.parametrize(("more_bytes", "share"), [(0, 0.5), (22, 0.7), (110, 1.0)])
def test_a_mixture_of_experts_reads_more_for_more_tokens(more_bytes: int, share: float) -> None:
    class Mixture(TimedModel):
        def pass_cost(
            self, subnetwork: SubNetwork | None = None, *, n_tokens: int = 1
        ) -> SimpleNamespace:
            cost = super().pass_cost(subnetwork)
            cost.weight_bytes += more_bytes * (n_tokens - 1)
            return cost

    costs = estimated(cast(Model, Mixture()))
    assert costs.verify_ms(2) / costs.verify_ms(1) == pytest.approx(1 + share)


def test_estimates_need_no_room() -> None:
    assert estimated(cast(Model, TimedModel(n_ctx=len(TEXT)))).is_estimate


# -- learned from live passes ----------------------------------------------------------------------


def live(costs: Costs | None = None) -> CostsHere:
    model = TimedModel()
    return CostsHere(cast(Any, model), costs or estimated(cast(Model, model)))


def test_two_plain_passes_set_the_scale() -> None:
    here = live()
    shares = [here.verify_ms(width) / here.verify_ms(1) for width in (2, 5)]
    draft_share = here.draft_ms(SubNetwork.uniform(3)) / here.verify_ms(1)
    here.observe(4, 154.0)  # alone it tells nothing
    here.observe(1, 95.0)
    assert not here.is_known
    here.observe(1, 300.0)  # a hiccup
    assert here.is_known
    assert here.verify_ms(1) == pytest.approx(95)
    assert [here.verify_ms(width) / 95 for width in (2, 5)] == pytest.approx(shares)
    assert here.draft_ms(SubNetwork.uniform(3)) / 95 == pytest.approx(draft_share)
    assert not here.measured.is_estimate
    assert not here.measured.is_sure


def test_widths_are_learned_as_they_are_used() -> None:
    here = live()
    for _ in range(CostsHere.FEW):
        here.observe(1, 95.0)
    assert widths(here.measured) == [1]
    here.observe(4, 154.0)
    assert here.verify_ms(4) == pytest.approx(154)
    assert here.verify_ms(2) == pytest.approx(95 + (154 - 95) / 3)
    for ms in (900.0, 150.0, 800.0, 700.0):  # the lower median of all five
        here.observe(4, ms)
    assert here.verify_ms(4) == pytest.approx(700)
    assert widths(here.measured) == [1, 4]
    before = here.verify_ms(4)
    here.observe(4, 90.0)  # from now on, corrections alone
    assert 0.9 * before < here.verify_ms(4) < before


def test_what_is_measured_is_corrected_and_not_learned_anew() -> None:
    costs = hurried(calm())
    here = live(costs)
    here.observe(4, 900.0)
    assert here.verify_ms(4) < 1.1 * costs.verify_ms(4)
    assert here.measured == costs
    here.observe(12, 320.0)  # that width was not measured
    assert here.verify_ms(12) == pytest.approx(320)


def test_what_was_learned_is_kept_and_completed_in_idle_time() -> None:
    here = live()
    for width in (1, 1, 4):
        here.observe(width, PASS_MS[width])
    kept = Costs.from_dict(here.refreshed().as_dict())
    assert dict(kept.pass_ms) == pytest.approx({1: 95.0, 4: 154.0})
    complete = hurried(calm(), known=kept)
    assert complete.is_sure
    assert dict(complete.pass_ms) == pytest.approx({w: PASS_MS[w] for w in QUICK_WIDTHS})


def test_a_longer_context_does_not_spoil_what_is_learned() -> None:
    model = TimedModel(n_ctx=4096)
    model.sublayers = ([sublayer(10_000, kv_bytes=4096)] * 3, model.sublayers[1])
    here = CostsHere(cast(Any, model), estimated(cast(Model, model)))
    for _ in range(CostsHere.FEW):
        here.observe(1, 95.0)
    model.tokens += [1] * 2000
    longer = here.verify_ms(1)
    assert longer > 95
    here.observe(4, 400.0)
    assert here.verify_ms(4) == pytest.approx(400)
    assert here.verify_ms(1) == pytest.approx(longer)
    del model.tokens[4:]
    assert here.verify_ms(1) == pytest.approx(95)
    assert here.verify_ms(4) < 400


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
