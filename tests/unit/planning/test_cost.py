"""Costs: what is measured is what was planted, and nothing of the context changes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift_gguf.errors import (
    ContextFullError,
    DecodeError,
    StoppedError,
    SubnetworkError,
    UnsupportedModelError,
)
from swift_gguf.gguf.sidecar import Sidecar
from swift_gguf.model import Sublayer
from swift_gguf.model.model import Model
from swift_gguf.native.abi import StopFlag
from swift_gguf.planning.cost import Costs, context_bucket, costs_key, stored_costs
from swift_gguf.planning.measuring import Budget, measure
from swift_gguf.subnetwork import SubNetwork

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
# ms of full passes; not monotone, as on real machines
PASS_MS = {1: 95.0, 2: 146.0, 3: 178.0, 4: 154.0, 6: 260.0, 8: 277.0, 12: 320.0, 16: 359.0}
TEXT = [7, 11, 13, 17]


def sublayer(weight_bytes: int, kv_bytes: int = 0, status: str = "ok") -> Sublayer:
    return Sublayer(status=status, weight_bytes=weight_bytes, kv_bytes=kv_bytes, n_nodes=1)


NARROW_SHARE, HEAD_MS = 0.75, 3.0  # saved by a sidecar


class TimedModel:
    """A model whose passes take planted times, on a clock that nothing else moves.

    attention_ms, ffn_ms: [n_layer], saved by leaving a sub-layer out of a one-token pass.
    interaction_ms: saved on top where both kinds are left out.
    row_ms: of a pass of several tokens, saved by every row of logits that nobody asks for.
    switch_ms: added where the pass before was another one.
    slow_passes: by number, ms that a pass takes longer.
    noise: by how much each pass takes longer, a factor.
    waiting: of a pass's time, what its threads wait for a CPU.
    stop_s: when somebody raises the stop flag.
    """

    rollback_refusal: str | None = None
    n_batch = 64
    sidecar: Sidecar | None = None

    def __init__(
        self,
        *,
        attention_ms: Sequence[float] = (2.0, 2.0, 4.0),
        ffn_ms: Sequence[float] = (10.0, 20.0, 30.0),
        unskippable: Sequence[int] = (),
        interaction_ms: float = 0.0,
        row_ms: float = 0.0,
        switch_ms: float = 0.0,
        noise: Callable[[], float] = lambda: 1.0,
        waiting: Callable[[], float] = lambda: 0.0,
        stop_s: float = math.inf,
        n_ctx: int = 256,
        slow_passes: dict[int, float] | None = None,
        fail_at: int | None = None,
        fail_with: Callable[[], BaseException] = KeyboardInterrupt,
    ) -> None:
        self.attention_ms, self.ffn_ms = attention_ms, ffn_ms
        self.interaction_ms, self.n_ctx = interaction_ms, n_ctx
        self.row_ms, self.switch_ms, self.noise = row_ms, switch_ms, noise
        self.waiting, self.stop_s = waiting, stop_s
        self.slow_passes = slow_passes or {}
        self.fail_at, self.fail_with = fail_at, fail_with
        self.stop = StopFlag()
        self.n_layer = len(ffn_ms)
        self.tokens = list(TEXT)
        self.now_s = self.waited_s = 0.0
        self.passes: list[tuple[int, SubNetwork | None]] = []
        self.inputs: list[list[int]] = []
        self.sublayers = tuple(
            [
                sublayer(int(1e6 * ms), status="unshared" if i in unskippable else "ok")
                for i, ms in enumerate(kind)
            ]
            for kind in (attention_ms, ffn_ms)
        )

    def clock(self) -> float:
        return self.now_s

    @property
    def n_past(self) -> int:
        return len(self.tokens)

    @property
    def room(self) -> int:
        return self.n_ctx - self.n_past

    def decode(
        self, tokens: Sequence[int], *, n_outputs: int, subnetwork: SubNetwork | None = None
    ) -> None:
        assert len(tokens) <= min(self.room, self.n_batch)
        assert min(2, len(tokens)) <= n_outputs <= len(tokens)  # for one row, other kernels
        self.inputs.append(list(tokens))
        self.tokens.extend(tokens)
        self.passes.append((len(tokens), subnetwork))
        ms = PASS_MS[len(tokens)] + self.slow_passes.get(len(self.passes), 0.0)
        ms -= self.row_ms * (len(tokens) - n_outputs)
        if self.passes[-1:] != self.passes[-2:-1]:
            ms += self.switch_ms
        if subnetwork:
            for kind, skipped, times in zip(
                self.sublayers,
                (subnetwork.skip_attn, subnetwork.skip_ffn),
                (self.attention_ms, self.ffn_ms),
                strict=True,
            ):
                assert all(kind[layer].status == "ok" for layer in skipped)
                ms -= sum(times[layer] for layer in skipped)
            if subnetwork.skip_attn and subnetwork.skip_ffn:
                ms -= self.interaction_ms
            ms -= NARROW_SHARE * sum(self.ffn_ms[layer] for layer in subnetwork.narrow_ffn)
            ms -= HEAD_MS if subnetwork.draft_head else 0.0
        seconds = self.noise() * ms / 1e3
        if self.now_s + seconds > self.stop_s:
            self.now_s = self.stop_s
            raise StoppedError("the pass was stopped")
        self.now_s += seconds
        self.waited_s += self.waiting() * seconds
        if len(self.passes) == self.fail_at:
            raise self.fail_with()

    def top(self, row: int, k: int = 1) -> tuple[list[int], list[float]]:
        assert row == 0
        return [1] * k, [0.5] * k

    def rollback(self, n_past: int) -> None:
        del self.tokens[n_past:]

    def pass_cost(
        self, subnetwork: SubNetwork | None = None, *, n_tokens: int = 1
    ) -> SimpleNamespace:
        n_bytes = 100
        if subnetwork:
            n_bytes -= 10 * bool(subnetwork.skip_attn) + 20 * bool(subnetwork.skip_ffn)
        return SimpleNamespace(weight_bytes=n_bytes, kv_bytes=10, head_bytes=60)


def measured(model: TimedModel, **options: Any) -> Costs:
    return measure(cast(Model, model), budget=budget(model), **options)


def budget(model: TimedModel, seconds: float = math.inf) -> Budget:
    return Budget(seconds=seconds, clock=model.clock, waited=lambda: model.waited_s)


# -- measuring -------------------------------------------------------------------------------------


def test_what_a_sidecar_saves_is_measured() -> None:
    model = TimedModel()
    costs = measured(model)
    assert (costs.narrow_ms, costs.draft_head_ms) == ((), 0.0)
    model.sidecar = Sidecar(path=Path("x"), n_narrow=(8, 0, 8), n_head=100)
    costs = measured(model)
    assert costs.narrow_ms == pytest.approx((7.5, 0.0, 22.5))
    assert costs.draft_head_ms == pytest.approx(HEAD_MS)


def test_measured_is_what_was_planted() -> None:
    model = TimedModel()
    costs = measured(model)
    assert dict(costs.pass_ms) == pytest.approx(PASS_MS)
    assert costs.attention_ms == pytest.approx((2, 2, 4))
    assert costs.ffn_ms == pytest.approx((10, 20, 30))
    assert costs.head_ms == pytest.approx((95 - 8 - 60) * 60 / 80)
    assert costs.kv_ms == (0, 0, 0)  # these attentions read no cache
    assert costs.n_kv == len(TEXT)


def test_a_draft_costs_what_its_pass_takes() -> None:
    model = TimedModel()
    subnetwork = SubNetwork(n_layer=3, skip_attn=frozenset({1}), skip_ffn=frozenset({0, 2}))
    assert measured(model).draft_ms(subnetwork) == pytest.approx(95 - 2 - 10 - 30)


def test_kinds_add_up_to_what_leaving_out_both_saves() -> None:
    costs = measured(TimedModel(interaction_ms=6.0))
    assert sum(costs.attention_ms) == pytest.approx(8 + 3)
    assert sum(costs.ffn_ms) == pytest.approx(60 + 3)
    layers = frozenset(range(3))
    everything = SubNetwork(n_layer=3, skip_attn=layers, skip_ffn=layers)
    assert costs.draft_ms(everything) == pytest.approx(95 - 74)


def test_nothing_is_saved_where_nothing_can_be_skipped() -> None:
    costs = measured(TimedModel(unskippable=[1]))
    assert costs.attention_ms == pytest.approx((2, 0, 4))
    assert costs.ffn_ms == pytest.approx((10, 0, 30))
    costs = measured(TimedModel(unskippable=[0, 1, 2]))
    assert costs.attention_ms == costs.ffn_ms == (0, 0, 0)
    assert dict(costs.pass_ms) == pytest.approx(PASS_MS)


def test_a_kind_that_cannot_be_skipped_leaves_the_other_alone() -> None:
    model = TimedModel()
    attention, ffn = model.sublayers
    model.sublayers = (attention, [replace(layer, status="absent") for layer in ffn])
    costs = measured(model)
    assert costs.attention_ms == pytest.approx((2, 2, 4))
    assert costs.ffn_ms == (0, 0, 0)


def test_the_cache_a_layer_reads_counts_as_far_as_it_is_full() -> None:
    model = TimedModel(attention_ms=(5.0, 5.0), ffn_ms=(1.0, 1.0), n_ctx=64)
    model.sublayers = ([sublayer(100), sublayer(100, kv_bytes=3200)], model.sublayers[1])
    # 4 of 64 tokens: 200 bytes more
    assert measured(model).attention_ms == pytest.approx((10 / 4, 10 * 3 / 4))


def test_noise_makes_no_negative_times() -> None:
    # leaving out attention seems to cost time
    costs = measured(TimedModel(attention_ms=(-3.0, -3.0), ffn_ms=(10.0, 20.0), n_ctx=64))
    assert costs.attention_ms == (0, 0)
    assert sum(costs.ffn_ms) == pytest.approx(24)
    # leaving out everything seems to cost time
    costs = measured(TimedModel(attention_ms=(1.0,), ffn_ms=(1.0,), interaction_ms=-9.0))
    assert costs.attention_ms == costs.ffn_ms == (0,)
    assert costs.head_ms == pytest.approx(95 * 60 / 80)


def test_a_slow_spell_does_not_count() -> None:
    calm = measured(TimedModel())
    n_passes = 8 + 1 + 1 + 3 + 4  # widths, rows, switch, without; passes of one token run twice
    slow = dict.fromkeys(range(n_passes // 2, n_passes // 2 + 2 * n_passes), 500.0)
    costs = measured(TimedModel(slow_passes=slow))
    assert dict(costs.pass_ms) == pytest.approx(dict(calm.pass_ms))
    assert costs.draft_ms(SubNetwork.uniform(3)) == pytest.approx(
        calm.draft_ms(SubNetwork.uniform(3))
    )


def test_the_pass_that_builds_the_graph_is_not_plain_decoding() -> None:
    costs = measured(TimedModel(switch_ms=1.5))
    assert costs.verify_ms(1) == pytest.approx(95)
    assert costs.verify_ms(4) == pytest.approx(155.5)  # a verification does follow something else
    assert costs.ffn_ms == pytest.approx((10, 20, 30))
    assert costs.switch_ms == pytest.approx(1.5)
    assert measured(TimedModel()).switch_ms == pytest.approx(0)


def test_rows_of_logits() -> None:
    assert measured(TimedModel(row_ms=3.25)).row_ms == pytest.approx(3.25)
    assert measured(TimedModel(row_ms=3.25), widths=(1, 3)).row_ms == pytest.approx(3.25)
    assert measured(TimedModel(row_ms=3.25), widths=(1, 2)).row_ms == 0  # that cannot be seen
    assert measured(TimedModel(row_ms=-3.0)).row_ms == 0  # noise


# -- on a noisy machine ----------------------------------------------------------------------------


def n_rounds(model: TimedModel) -> int:
    """No other pass is as wide as the widest."""
    return sum(width == max(WIDTHS) for width, _ in model.passes)


def only_ever_later(seed: int) -> Callable[[], float]:
    """10 %, lognormal, and rarely a hiccup."""
    rng = random.Random(seed)
    return lambda: (3.0 if rng.random() < 0.03 else 1.0) * math.exp(abs(rng.gauss(0, 0.1)))


def errors(rounds: int, seeds: int) -> list[float]:
    """Of every width in so many measurements."""
    found = [measured(TimedModel(noise=only_ever_later(i)), rounds=rounds) for i in range(seeds)]
    return [abs(ms / PASS_MS[width] - 1) for costs in found for width, ms in costs.pass_ms]


def test_a_quiet_machine_is_not_measured_for_long() -> None:
    for rounds in (2, 3, 5):
        measured(model := TimedModel(), rounds=rounds)
        assert n_rounds(model) == rounds


def test_a_noisy_machine_is_measured_until_times_are_confirmed_or_the_limit() -> None:
    doubling = iter(range(1, 1000))
    measured(model := TimedModel(noise=lambda: 1.05 ** next(doubling)), rounds=2)
    assert n_rounds(model) == 6  # no time is ever met again
    settling = iter([4.0] * 10)  # the first round alone is slow: it confirms nothing
    measured(model := TimedModel(noise=lambda: next(settling, 1.0)), rounds=2)
    assert n_rounds(model) == 3


def test_times_on_a_noisy_machine() -> None:
    by_default = errors(rounds=3, seeds=40)
    assert sum(error < 0.05 for error in by_default) > 0.95 * len(by_default)
    assert max(by_default) < 0.1
    assert max(errors(rounds=18, seeds=10)) < 0.05
    noise = only_ever_later(0)  # single passes would not do
    assert sum(noise() > 1.05 for _ in range(100)) > 50


def test_the_inputs_are_text() -> None:
    model = TimedModel()
    measured(model, rounds=1)
    assert {tuple(tokens) for tokens in model.inputs} == {
        tuple((TEXT * width)[-width:]) for width in WIDTHS
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt, lambda: DecodeError("made for a test")])
def test_the_context_is_as_before_whatever_happens(error: Callable[[], BaseException]) -> None:
    model = TimedModel()
    measured(model, rounds=1)
    assert model.tokens == TEXT
    for number in range(1, len(model.passes) + 1):
        model = TimedModel(fail_at=number, fail_with=error)
        with pytest.raises((KeyboardInterrupt, DecodeError)):
            measured(model, rounds=1)
        assert model.tokens == TEXT
        assert len(model.passes) == number


def test_widths_that_do_not_fit_are_left_out() -> None:
    def widths(model: TimedModel, **options: Any) -> list[int]:
        return [width for width, _ in measured(model, **options).pass_ms]

    assert widths(TimedModel(n_ctx=len(TEXT) + 5)) == [1, 2, 3, 4]
    assert widths(TimedModel(n_ctx=len(TEXT) + 1)) == [1]
    assert widths(TimedModel(), widths=(8, 4, 4)) == [1, 4, 8]
    model = TimedModel()
    model.n_batch = 3
    assert widths(model) == [1, 2, 3]


def test_refusals() -> None:
    with pytest.raises(ContextFullError, match="--ctx-size"):
        measured(TimedModel(n_ctx=len(TEXT)))
    for options in ({"rounds": 0}, {"widths": (0, 1)}):
        with pytest.raises(ValueError):
            measured(TimedModel(), **options)
    empty = TimedModel()
    empty.tokens.clear()
    with pytest.raises(ValueError, match="tokens in the context"):
        measured(empty)
    recurrent = TimedModel()
    recurrent.rollback_refusal = "its state cannot be cut back"
    with pytest.raises(UnsupportedModelError, match="cut back"):
        measured(recurrent)
    assert recurrent.passes == []


# -- the value -------------------------------------------------------------------------------------

MS = st.floats(0, 1e6)
PASS = st.floats(1e-3, 1e6)
PASSES = st.dictionaries(st.integers(2, 200), PASS, max_size=9).flatmap(
    lambda wide: PASS.map(lambda ms: ((1, ms), *sorted(wide.items())))
)


@st.composite
def costs(draw: st.DrawFn) -> Costs:
    n_layer = draw(st.integers(1, 6))
    times = st.lists(MS, min_size=n_layer, max_size=n_layer).map(tuple)
    return Costs(
        pass_ms=draw(PASSES),
        attention_ms=draw(times),
        ffn_ms=draw(times),
        kv_ms=draw(times),
        head_ms=draw(MS),
        more_ms=draw(MS),
        n_kv=draw(st.integers(0, 1 << 20)),
        row_ms=draw(MS),
        switch_ms=draw(MS),
    )


@given(costs())
def test_round_trip(value: Costs) -> None:
    assert Costs.from_dict(json.loads(json.dumps(value.as_dict(), allow_nan=False))) == value


@given(costs(), st.integers(1, 300))
def test_passes_between_and_beyond_the_measured_widths(value: Costs, width: int) -> None:
    points = dict(value.pass_ms)
    ms = value.verify_ms(width)
    below = [w for w in points if w <= width]
    above = [w for w in points if w >= width]
    if above:
        low, high = points[below[-1]], points[above[0]]
        slack = 1e-9 * max(low, high)
        assert min(low, high) - slack <= ms <= max(low, high) + slack
    else:
        assert ms >= points[below[-1]]
        assert value.verify_ms(width + 1) >= ms


@given(costs(), st.data())
def test_skipping_more_never_costs_more(value: Costs, data: st.DataObject) -> None:
    layers = st.frozensets(st.integers(0, value.n_layer - 1))
    attn, ffn, more = (data.draw(layers) for _ in range(3))
    n_layer = value.n_layer
    less = value.draft_ms(SubNetwork(n_layer=n_layer, skip_attn=attn | more, skip_ffn=ffn | more))
    full = value.draft_ms(SubNetwork(n_layer=n_layer))
    assert 0 <= less <= value.draft_ms(SubNetwork(n_layer=n_layer, skip_attn=attn, skip_ffn=ffn))
    assert full == value.pass_ms[0][1]


SOME = Costs(
    pass_ms=((1, 10.0), (2, 16.0), (4, 14.0)),
    attention_ms=(1.0, 0.0),
    ffn_ms=(3.0, 4.0),
    kv_ms=(0.25, 0.0),
    head_ms=1.5,
    n_kv=4,
    row_ms=1.25,
    switch_ms=0.5,
)


def test_a_longer_context_costs_its_attention() -> None:
    longer = SOME.at(8)
    assert longer.attention_ms == (2.0, 0.0)
    assert longer.pass_ms == ((1, 11.0), (2, 18.0), (4, 18.0))  # every row reads the cache
    assert (longer.ffn_ms, longer.n_kv) == (SOME.ffn_ms, 8)
    without = SubNetwork(n_layer=2, skip_attn=frozenset({0}))
    assert longer.draft_ms(without) == SOME.draft_ms(without)
    assert longer.at(4) == SOME
    assert min(ms for _, ms in SOME.at(0).pass_ms) > 0


def test_lines_between_the_widths() -> None:
    assert [SOME.verify_ms(width) for width in (1, 2, 3, 4)] == pytest.approx([10, 16, 15, 14])
    assert SOME.verify_ms(8) == pytest.approx(14 + 4 * (14 - 10) / 4)  # the last step fell
    rising = replace(SOME, pass_ms=((1, 10.0), (2, 12.0), (4, 18.0)))
    assert rising.verify_ms(10) == pytest.approx(36)
    alone = replace(SOME, pass_ms=((1, 10.0),), more_ms=6.0)
    assert [alone.verify_ms(width) for width in (1, 3)] == pytest.approx([10, 22])
    with pytest.raises(ValueError):
        SOME.verify_ms(0)


def test_a_sub_network_of_another_model_has_no_cost() -> None:
    with pytest.raises(SubnetworkError, match="3 layers"):
        SOME.draft_ms(SubNetwork(n_layer=3))


@pytest.mark.parametrize(
    "change",
    [
        {"pass_ms": []},
        {"pass_ms": [[2, 10.0]]},
        {"pass_ms": [[1, 10.0], [1, 12.0]]},
        {"pass_ms": [[1, 10.0], [4, 12.0], [2, 11.0]]},
        {"pass_ms": [[1, 0.0]]},
        {"pass_ms": [[1, math.nan]]},
        {"pass_ms": [[1.0, 10.0]]},
        {"pass_ms": [[1, 10.0, 3]]},
        {"pass_ms": [1, 10.0]},
        {"pass_ms": {"1": 10.0}},
        {"attention_ms": [1.0]},
        {"attention_ms": [1.0, -0.5]},
        {"attention_ms": [1.0, math.inf]},
        {"attention_ms": [], "ffn_ms": []},
        {"ffn_ms": [1.0, math.nan]},
        {"ffn_ms": [1.0, True]},
        {"ffn_ms": [1.0, "2"]},
        {"ffn_ms": 3.0},
        {"head_ms": -1.0},
        {"head_ms": None},
        {"more_ms": -1.0},
        {"row_ms": -1.0},
        {"row_ms": math.nan},
        {"switch_ms": math.inf},
        {"switch_ms": "0"},
        {"head_ms": 10**400},
        {"n_kv": -1},
        {"n_kv": 1.5},
        {"unknown": 1},
    ],
)
def test_malformed_costs_are_refused(change: dict[str, Any]) -> None:
    assert Costs.from_dict(SOME.as_dict()) == SOME
    with pytest.raises(ValueError):
        Costs.from_dict(SOME.as_dict() | change)


@pytest.mark.parametrize("name", SOME.as_dict())
def test_incomplete_costs_are_refused(name: str) -> None:
    values = SOME.as_dict()
    del values[name]
    with pytest.raises(ValueError):
        Costs.from_dict(values)


@pytest.mark.parametrize("values", [None, [], "pass_ms", 3])
def test_something_else_is_refused(values: Any) -> None:
    with pytest.raises(ValueError):
        Costs.from_dict(values)


# -- where they are kept ---------------------------------------------------------------------------


def loaded(n_past: int, *, machine: str = "cpu-2t-0a1b2c") -> Model:
    return cast(Model, SimpleNamespace(machine_key=machine, n_past=n_past))


def kept(*lengths: int, model: Model | None = None) -> dict[str, dict[str, Any]]:
    measured_at = [replace(SOME, n_kv=n_kv) for n_kv in lengths]
    return {costs_key(model or loaded(0), costs): costs.as_dict() for costs in measured_at}


def test_buckets() -> None:
    lengths = (0, 1, 256, 257, 512, 513, 4096)
    assert [context_bucket(n) for n in lengths] == [256, 256, 256, 512, 512, 1024, 4096]


def test_the_key_names_what_costs_depend_on() -> None:
    models = [loaded(0), loaded(0, machine="cpu-4t-0a1b2c")]
    keys = {costs_key(m, replace(SOME, n_kv=n)) for m in models for n in (32, 2000)}
    assert len(keys) == 4
    assert costs_key(loaded(0), SOME) == "cpu-2t-0a1b2c@256"
    # those measured in one bucket replace each other
    assert len(kept(32, 200)) == 1


def test_the_nearest_context_counts() -> None:
    def n_kv(n_past: int, *lengths: int) -> int | None:
        costs = stored_costs(loaded(n_past), kept(*lengths))
        return costs.n_kv if costs else None

    assert n_kv(0, 32, 2000) == 32
    assert n_kv(700, 32, 600, 5000) == 600
    assert n_kv(1800, 32, 2000) == 2000
    assert n_kv(0, 5000) == 5000
    assert n_kv(0) is None
    assert n_kv(5000, 32, 1000) == 1000


def test_costs_of_another_machine_are_not_ours() -> None:
    other = loaded(0, machine="cpu-2t-nofa-0a1b2c")
    assert stored_costs(loaded(0), kept(32, model=other)) is None
    assert stored_costs(other, kept(32, model=other)) is not None
    assert stored_costs(other, kept(32)) is None
