"""When a search steps while text is generated, and on what: budgets and windows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_gguf.errors import ContextFullError, DecodeError, StoppedError
from swift_gguf.model.model import Model
from swift_gguf.search import drivers
from swift_gguf.search.drivers import IdleSearch, Meter, OnTheFly
from swift_gguf.search.objective import Window
from swift_gguf.search.window import MIN_POSITIONS, TextWindow, Windows
from swift_gguf.subnetwork import SubNetwork

WHOLE = SubNetwork(n_layer=4)
SKIPPING = SubNetwork(n_layer=4, skip_ffn=frozenset([1]))
SOME_WINDOW = cast(TextWindow, object())

# -- the budget ------------------------------------------------------------------------------------


@dataclass
class FakeSearcher:
    """Takes the time it is told to, on a clock of its own."""

    costs: Iterator[float]
    best: SubNetwork = WHOLE
    done: bool = False
    fails: bool = False
    now: float = 0.0
    steps: int = 0

    def step(self, window: Window) -> None:
        assert window is SOME_WINDOW
        self.now += next(self.costs)
        self.steps += 1
        if self.fails:
            raise DecodeError("no; try again")


@contextmanager
def clock_of(searcher: FakeSearcher) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drivers, "perf_counter", lambda: searcher.now)
        yield


def some_window() -> TextWindow:
    return SOME_WINDOW


seconds = st.floats(1e-4, 2.0)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(seconds, min_size=1, max_size=300),
    st.lists(seconds, min_size=1, max_size=20),
    seconds,
    st.sampled_from([0.01, 0.05, 0.5, 1.0]),
)
def test_the_share_holds_at_any_moment(
    cycles: list[float], costs: list[float], first_cost: float, share: float
) -> None:
    """Over it goes only what a step took more than the dearest of the latest let expect."""
    searcher = FakeSearcher(costs=(costs[i % len(costs)] for i in range(10**6)))
    driver = OnTheFly(searcher, some_window, cost_s=lambda: first_cost, share=share)
    generated = spent = 0.0
    expected, latest = first_cost, list[float]()
    with clock_of(searcher):
        for cycle_s in cycles:
            before = searcher.now
            driver.step(cycle_s)
            generated += cycle_s
            took = searcher.now - before
            if took:
                assert spent + expected <= share * generated + 1e-9, "begun without the money"
                spent += took
                surprise = max(0.0, took - expected)
                latest.append(took)
                expected = max(latest[-8:])
                assert spent <= share * generated + surprise + 1e-9
            else:  # nor is time left that would pay for a step
                assert spent + expected > share * generated - 1e-9
    assert driver.meter.seconds == pytest.approx(spent)
    assert driver.meter.steps == searcher.steps


def test_control_without_a_clock_the_share_does_not_hold() -> None:
    searcher = FakeSearcher(costs=iter([0.5] * 200))
    driver = OnTheFly(searcher, some_window, cost_s=lambda: 0.5, share=0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drivers, "perf_counter", lambda: 0.0)
        for _ in range(200):
            driver.step(0.1)
    assert searcher.now > 0.05 * 200 * 0.1 + 0.5


def test_what_is_not_used_is_kept_while_there_is_no_window() -> None:
    searcher = FakeSearcher(costs=iter([0.1] * 100))
    windows: list[TextWindow | None] = [None] * 40
    driver = OnTheFly(
        searcher, lambda: windows.pop() if windows else SOME_WINDOW, cost_s=lambda: 0.1, share=0.5
    )
    with clock_of(searcher):
        while windows:
            driver.step(0.1)
        assert searcher.steps == 0
        driver.step(0.1)
        driver.step(0.1)
    assert searcher.steps == 2


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_swift_s_way_is_a_step_every_so_many_cycles(interval: int) -> None:
    """However long steps take, and however short cycles are."""
    searcher = FakeSearcher(costs=iter([100.0] * 100))
    driver = OnTheFly(searcher, some_window, cost_s=lambda: 100.0, share=None, interval=interval)
    with clock_of(searcher):
        for cycle in range(1, 21):
            driver.step(1e-6)
            assert searcher.steps == cycle // interval


@pytest.mark.parametrize("share", [None, 1.0])
def test_nothing_happens_when_the_search_is_done(share: float | None) -> None:
    searcher = FakeSearcher(costs=iter([0.1] * 100), done=True)
    asked: list[int] = []

    def window() -> TextWindow:
        asked.append(1)
        return SOME_WINDOW

    driver = OnTheFly(
        searcher, window, cost_s=lambda: 0.0, share=share, on_step=lambda: asked.append(2)
    )
    for _ in range(20):
        driver.step(1.0)
    assert asked == []
    assert driver.meter == Meter()
    searcher.done = False  # reopened: the budget does not hold what was never meant for it
    with clock_of(searcher):
        driver.step(1.0)
    assert (searcher.steps, asked) == (1, [1, 2])


def test_every_step_is_told_and_metered() -> None:
    searcher, told = FakeSearcher(costs=iter([0.25] * 9)), []
    meter = Meter(seconds=1.0, steps=7)
    driver = OnTheFly(
        searcher,
        some_window,
        cost_s=lambda: 0.0,
        share=1.0,
        on_step=lambda: told.append(searcher.steps),
        meter=meter,
    )
    with clock_of(searcher):
        for _ in range(3):
            driver.step(1.0)
    assert told == [1, 2, 3]
    assert driver.meter is meter
    assert (meter.seconds, meter.steps) == (1.75, 10)


def test_a_step_that_fails_ends_the_search_not_the_text(caplog: pytest.LogCaptureFixture) -> None:
    searcher, told = FakeSearcher(costs=iter([0.25] * 9), fails=True), []
    driver = OnTheFly(
        searcher, some_window, cost_s=lambda: 0.1, share=0.2, on_step=lambda: told.append(1)
    )
    with clock_of(searcher):
        for _ in range(20):
            driver.step(1.0)
    assert (searcher.steps, told, driver.meter.steps) == (1, [], 0)
    assert driver.meter.seconds == 0.25  # it is paid for
    assert [record.getMessage() for record in caplog.records] == ["the search stops: no; try again"]


# -- windows ---------------------------------------------------------------------------------------


@dataclass
class FakeModel:
    """Just what windows need.  Drafts are right at even positions, sure below 10."""

    tokens: list[int]
    n_ctx: int = 1000
    passes: list[tuple[int, int, bool]] = field(default_factory=list)
    """start, n, own_past"""
    stop_after: int | None = None
    """Passes."""
    _start: int = 0

    @property
    def n_past(self) -> int:
        return len(self.tokens)

    @property
    def room(self) -> int:
        return self.n_ctx - self.n_past

    def redecode(
        self, start: int, n: int, *, subnetwork: SubNetwork | None = None, own_past: bool = False
    ) -> None:
        assert subnetwork is not None
        assert start >= 0
        assert n >= 1
        assert start + n < self.n_past  # a next token is there to be compared with
        if n > self.room:
            raise ContextFullError("no room; use a larger --ctx-size")
        if self.stop_after is not None and len(self.passes) >= self.stop_after:
            raise StoppedError("the pass was stopped")
        self.passes.append((start, n, own_past))
        self._start = start

    def top(self, row: int, k: int = 1) -> tuple[list[int], list[float]]:
        position = self._start + row
        guess = self.tokens[position + 1] if position % 2 == 0 else -1
        return [guess], [0.9 if position < 10 else 0.1]


def windows_of(model: FakeModel, *, n: int, first: int = 1, **options: Any) -> Windows:
    windows = Windows(cast(Any, model), n=n, **options)
    windows.first = first
    return windows


def text_window(model: FakeModel, start: int, n: int, **options: Any) -> TextWindow:
    return TextWindow(cast(Any, model), start, n, **options)


def grow(model: FakeModel, n: int) -> None:
    model.tokens.extend(range(model.n_past, model.n_past + n))


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_window_serves_some_steps_while_the_text_grows(steps: int) -> None:
    model = FakeModel(list(range(50)))
    windows = windows_of(model, n=16, steps=steps)
    ends = []
    for _ in range(2 * steps + 1):
        window = windows()
        assert window is not None
        ends.append((window.start, window.start + window.n))
        grow(model, 1)
    first, second, third = ((49 + i * steps - 16, 49 + i * steps) for i in range(3))
    assert ends == [first] * steps + [second] * steps + [third]


def test_another_text_makes_another_window_at_once() -> None:
    model = FakeModel(list(range(50)))
    windows = windows_of(model, n=16, steps=8)
    first = windows()
    assert first is not None
    model.tokens[40] = 999
    second = windows()
    assert second is not None
    assert second.key != first.key
    assert not first.is_current
    assert windows() is second
    del model.tokens[45:]  # cut back: the text that the window was of is not there any more
    third = windows()
    assert third is not None
    assert third.start + third.n == 44


@pytest.mark.parametrize("n_left", [50, 45])
def test_what_follows_a_generation_is_in_no_window(n_left: int) -> None:
    """Nor what replaced its end."""
    model = FakeModel(list(range(50)))
    windows = windows_of(model, n=16, steps=1)
    windows.text = list(model.tokens)
    first = windows()
    del model.tokens[n_left:]
    model.tokens.extend(range(100, 120))
    again = windows()
    assert first is not None
    assert again is not None
    assert first.start + first.n == 49
    assert again.start + again.n == (33 if n_left == 50 else 44)  # the one before, or an earlier
    windows.text = None
    latest = windows()
    assert latest is not None
    assert latest.start + latest.n == n_left + 19


def test_a_text_cut_back_behind_the_window_leaves_it() -> None:
    model = FakeModel(list(range(50)))
    windows = windows_of(model, n=16, steps=8)
    first = windows()
    grow(model, 10)
    del model.tokens[52:]
    assert windows() is first


@given(st.integers(1, 60), st.integers(0, 70), st.integers(1, 32), st.integers(0, 40))
def test_a_window_holds_only_what_the_target_chose(
    n_past: int, first: int, n: int, room: int
) -> None:
    """As much of it as the window may hold and the context has room for; else none."""
    model = FakeModel(list(range(n_past)), n_ctx=n_past + room)
    window = windows_of(model, n=n, first=first)()
    # after these, the next token is there and was chosen by the target
    judged = [i for i in range(n_past - 1) if i + 1 >= first]
    usable = min(len(judged), n, room)
    if usable < min(MIN_POSITIONS, n):
        assert window is None
        return
    assert window is not None
    assert list(range(window.start, window.start + window.n)) == judged[len(judged) - usable :]


def test_a_short_text_has_a_window_as_soon_as_it_is_worth_a_pass() -> None:
    model = FakeModel(list(range(20)))
    windows = windows_of(model, n=32, first=20)
    sizes = []
    for _ in range(12):
        window = windows()
        sizes.append(window.n if window else 0)
        grow(model, 1)
    assert sizes[:8] == [0] * 8
    assert sizes[8] == MIN_POSITIONS


def test_a_window_is_not_offered_when_the_context_has_no_room_for_it() -> None:
    model = FakeModel(list(range(50)), n_ctx=66)
    windows = windows_of(model, n=16, steps=8)
    while model.room:
        window = windows()
        if window is not None:
            window.score(SKIPPING)
        grow(model, 1)


def test_a_score_is_the_draft_against_the_text() -> None:
    model = FakeModel(list(range(100, 130)))
    outcome = text_window(model, 5, 12).score(SKIPPING)
    assert outcome.agrees.tolist() == [position % 2 == 0 for position in range(5, 17)]
    assert outcome.confidence.tolist() == pytest.approx([0.9] * 5 + [0.1] * 7)
    assert model.passes == [(5, 12, False)]


def test_windows_of_the_same_positions_of_the_same_text_are_the_same() -> None:
    model = FakeModel(list(range(30)))
    key = text_window(model, 5, 12).key
    grow(model, 5)
    assert text_window(model, 5, 12).key == key
    assert text_window(model, 6, 12).key != key
    assert text_window(model, 5, 11).key != key
    model.tokens[17] = 99  # what the last position is judged by
    assert text_window(model, 5, 12).key != key


def chunks(passes: Sequence[tuple[int, int, bool]]) -> list[tuple[int, int]]:
    return [(start, n) for start, n, _ in passes]


@given(st.integers(1, 7), st.integers(0, 8))
def test_a_stopped_score_goes_on_where_it_was(chunk: int, stop_after: int) -> None:
    model = FakeModel(list(range(100, 130)))
    whole = text_window(model, 3, 20, chunk=chunk).score(SKIPPING)
    undisturbed = chunks(model.passes)
    assert [n for _, n in undisturbed] == [chunk] * (20 // chunk) + [20 % chunk] * (20 % chunk > 0)
    window = text_window(model, 3, 20, chunk=chunk)
    model.passes.clear()
    model.stop_after = stop_after
    if stop_after < len(undisturbed):
        with pytest.raises(StoppedError):
            window.score(SKIPPING)
        with pytest.raises(StoppedError):  # at once again: nothing lost, nothing twice
            window.score(SKIPPING)
        model.stop_after = None
    outcome = window.score(SKIPPING)
    assert chunks(model.passes) == undisturbed
    assert outcome.agrees.tolist() == whole.agrees.tolist()
    assert outcome.confidence.tolist() == whole.confidence.tolist()


def test_what_was_stopped_is_kept_for_its_own_sub_network() -> None:
    model = FakeModel(list(range(100, 130)), stop_after=2)
    window = text_window(model, 3, 12, chunk=4)
    with pytest.raises(StoppedError):
        window.score(SKIPPING)
    model.stop_after = None
    assert len(window.score(WHOLE)) == len(window.score(SKIPPING)) == 12
    assert chunks(model.passes) == [(3, 4), (7, 4), (3, 4), (7, 4), (11, 4), (11, 4)]
    window.score(SKIPPING)  # and not for a second time: a score is a measurement
    assert len(model.passes) == 9


def test_the_paper_s_window_is_one_pass_on_its_own_past() -> None:
    model = FakeModel(list(range(100, 150)))
    windows = windows_of(model, n=32, steps=1, own_past=True, chunk=4)
    window = windows()
    assert window is not None
    window.score(SKIPPING)
    assert model.passes == [(17, 32, True)]
    grow(model, 3)
    window = windows()
    assert window is not None
    assert window.start == 20


class Flag:
    def __init__(self) -> None:
        self.is_up = False

    def raise_(self) -> None:
        self.is_up = True

    def lower(self) -> None:
        self.is_up = False


class StoppableModel:
    def __init__(self) -> None:
        self.stop = Flag()


def test_an_interrupt_while_waiting_leaves_the_flag_down_and_the_search_alive() -> None:
    model = StoppableModel()
    steps: list[int] = []

    class Slow:
        done = False
        best = SubNetwork(n_layer=1)

        def step(self, window: Any) -> None:
            steps.append(1)
            while not model.stop.is_up:
                time.sleep(0.001)
            raise StoppedError("stopped")

    with IdleSearch(cast(Model, model), Slow(), some_window) as idle:
        while not steps:
            time.sleep(0.001)
        wait = idle._state.wait
        interrupted: list[int] = []

        def interrupting(timeout: float | None = None) -> bool:
            if threading.current_thread() is threading.main_thread() and not interrupted:
                interrupted.append(1)
                raise KeyboardInterrupt
            return wait(timeout)

        idle._state.wait = interrupting  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt), idle.paused():
            pytest.fail("the model was not free yet")
        assert not model.stop.is_up
        with idle.paused():
            assert not model.stop.is_up
            n = len(steps)
        while len(steps) == n:  # and it goes on
            time.sleep(0.001)
