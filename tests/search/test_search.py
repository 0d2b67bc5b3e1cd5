"""Search, idle time, profiles and drawn drafts on real, generated models."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from swift_gguf.drafting import LayerSkip
from swift_gguf.drafting.policy import Threshold
from swift_gguf.drafting.source import Cycle
from swift_gguf.drafting.tree import Shape
from swift_gguf.engine import SamplesRows, generate
from swift_gguf.errors import DecodeError, SubnetworkError, UnsupportedModelError
from swift_gguf.gguf.identity import fingerprint
from swift_gguf.learning import learning
from swift_gguf.learning.learning import Learning, space_of
from swift_gguf.learning.profile import Store
from swift_gguf.model.model import Model
from swift_gguf.planning.cost import Costs
from swift_gguf.planning.measuring import Budget
from swift_gguf.sampling import sampling
from swift_gguf.sampling.sampling import Sampler, SamplingOptions, SpeculativeSampler
from swift_gguf.sampling.speculative import Distribution, draw
from swift_gguf.search.drivers import IdleSearch, OnTheFly
from swift_gguf.search.objective import Window
from swift_gguf.search.optimizer import Search
from swift_gguf.search.paper import PaperOptions
from swift_gguf.search.space import Space
from swift_gguf.search.window import TextWindow, Windows
from swift_gguf.speculation import NOT_TIMED, TREES, Speculation, SpeculationOptions
from swift_gguf.stats import Stats
from swift_gguf.subnetwork import SubNetwork
from tests.fixtures.tiny_gguf import VOCAB

PROMPT = list(range(5, 25))
GREEDY = SamplingOptions(temperature=0.0)
INVARIANT = "Q8_0"  # kernels that round the same at every width
N_LAYER = 8
NOOP_ATTN, NOOP_FFN = (2, 5), (1, 3, 6)
PLANTED = SubNetwork(n_layer=N_LAYER, skip_attn=frozenset(NOOP_ATTN), skip_ffn=frozenset(NOOP_FFN))

Opener = Callable[..., Model]
Tiny = Callable[..., Path]


@dataclass(frozen=True)
class FixedCosts:
    """In milliseconds; the same on every machine, so that a search is, too."""

    n_layer: int = N_LAYER

    def draft_ms(self, subnetwork: SubNetwork) -> float:
        skipped = len(subnetwork.skip_attn) + len(subnetwork.skip_ffn)
        return 1.0 - 0.9 * skipped / (2 * self.n_layer)

    def verify_ms(self, width: int) -> float:
        return 1.0 + 0.1 * (width - 1)


@pytest.fixture
def load(tiny: Tiny, open_model: Opener) -> Opener:
    """`load(family, ...)`: on one thread, which is faster for models as small as these."""

    def load_(family: str = "llama", *, n_ctx: int = 512, **options: Any) -> Model:
        return open_model(tiny(family, **options), n_ctx=n_ctx, n_threads=1)

    return load_


def with_no_ops(load: Opener, **options: Any) -> Model:
    return load(n_layer=N_LAYER, quant=INVARIANT, noop_attn=NOOP_ATTN, noop_ffn=NOOP_FFN, **options)


def without_no_ops(load: Opener, **options: Any) -> Model:
    return load(n_layer=N_LAYER, quant=INVARIANT, **options)


def run(model: Model, prompt: Sequence[int], n: int, **options: Any) -> list[int]:
    """Greedy, unless another sampler is given."""
    with Sampler(model, GREEDY) as greedy:
        sampler: SamplesRows = options.pop("sampler", greedy)
        tokens = generate(model, prompt, sampler=sampler, max_tokens=n, **options)
        return [token.id for token in tokens]


def space(model: Model) -> Space:
    found = space_of(model)
    assert found is not None
    return found


# -- the search ------------------------------------------------------------------------------------


def write(model: Model, n: int = 440) -> list[int]:
    """Fills the context with what the model writes by itself."""
    prompt = list(PROMPT)
    while model.n_past < n:
        prompt += [*run(model, prompt, n - len(prompt) + 1), 7 + len(prompt) % 50]  # a text may end
    return model.tokens


def windows_of(model: Model, steps: int) -> Iterator[TextWindow]:
    """A window for each step: ten times the same, then the next 32 positions, and round again."""
    starts = range(len(PROMPT), model.n_past - 33, 32)
    windows = [TextWindow(model, start, 32) for start in starts]
    return (windows[i // 10 % len(windows)] for i in range(steps))


@pytest.mark.parametrize("seed", range(2))
def test_planted_no_ops_are_found_and_their_drafts_accepted(load: Opener, seed: int) -> None:
    model = with_no_ops(load)
    write(model)
    search = Search(space(model), FixedCosts(), seed=seed)
    for window in windows_of(model, 250):
        search.step(window)
    assert search.best == PLANTED
    assert search.rate(search.best).agreement == 1.0
    stats, prompt = Stats(), [9, *PROMPT]
    drafter = LayerSkip(model, search.best)
    tokens = run(model, prompt, 100, drafter=drafter, stats=stats)
    assert stats.acceptance_rate == 1.0
    assert stats.drafted > 50
    assert tokens == run(model, prompt, 100)


def test_where_nothing_may_be_skipped_the_search_does_no_harm(load: Opener) -> None:
    model, plain = without_no_ops(load), without_no_ops(load)
    search = Search(space(model), FixedCosts())
    drafter = LayerSkip(model, search.best, policy=Threshold(0.5))

    def adopt() -> None:
        drafter.subnetwork = search.best

    windows = Windows(model, n=16)
    windows.first = len(PROMPT)
    driver = OnTheFly(search, windows, cost_s=lambda: 0.0, share=1.0, on_step=adopt)
    stats = Stats()
    tokens = run(model, PROMPT, 300, drafter=drafter, search=driver, stats=stats)
    assert tokens == run(plain, PROMPT, 300)
    assert model.tokens == plain.tokens
    assert driver.meter.steps > 20
    assert stats.search_s >= driver.meter.seconds > 0
    rate = search.rate(search.best)
    assert rate.positions >= 16
    assert 0 < rate.agreement <= 1


# -- idle time -------------------------------------------------------------------------------------


def requests(rng: random.Random, n: int) -> Iterator[tuple[float, bool, list[int], int]]:
    """Seconds of silence, whether it goes on with the text, what is said, how much is answered."""
    for i in range(n):
        said = [rng.randrange(5, 200) for _ in range(rng.randint(2, 12))]
        yield rng.uniform(0.0, 0.25), i > 0 and rng.random() < 0.6, said, rng.randint(5, 15)


def test_texts_are_the_same_while_a_search_uses_the_idle_time(
    load: Opener, capsys: pytest.CaptureFixture[str]
) -> None:
    model, undisturbed = without_no_ops(load), without_no_ops(load)
    windows = Windows(model, n=32, chunk=8)
    waits: list[float] = []
    steps: list[int] = []
    search = Search(space(model), FixedCosts(), patience=10**6)
    with IdleSearch(model, search, windows) as idle:
        text: list[int] = []
        for silence, goes_on, said, n in requests(random.Random(3), 25):
            time.sleep(silence)
            start = time.perf_counter()
            with idle.paused():
                waits.append(time.perf_counter() - start)
                steps.append(idle.meter.steps)
                prompt = [*text, *said] if goes_on and len(text) < 400 else said
                windows.first = len(prompt)
                drafter = LayerSkip(model, search.best, policy=Threshold(0.3))
                answer = run(model, prompt, n, drafter=drafter)
                assert idle.meter.steps == steps[-1], "it goes on while the model is in use"
            text = [*prompt, *answer]
            assert answer == run(undisturbed, prompt, n)
    with capsys.disabled():
        ms = [1e3 * wait for wait in sorted(waits)]
        print(f" [wait: median {ms[len(ms) // 2]:.2f} ms, max {ms[-1]:.2f} ms]", end="")
    assert max(waits) <= 0.25
    assert idle.meter.steps > 20
    assert len(set(steps)) > 10  # in many of the silences, not in a single long one


def test_an_idle_error_surfaces_at_close_and_the_text_goes_on(load: Opener) -> None:
    class Broken:
        best = SubNetwork(n_layer=N_LAYER)
        done = False

        def step(self, window: Window) -> None:
            raise DecodeError("the search is broken")

    model, plain = without_no_ops(load), without_no_ops(load)
    expected = run(plain, PROMPT, 40)
    idle = IdleSearch(model, Broken(), Windows(model, n=16))
    with idle.paused():
        first = run(model, PROMPT, 20)
    time.sleep(0.05)
    with idle.paused():
        assert [*first, *run(model, [*PROMPT, *first], 20)] == expected
    with pytest.raises(DecodeError, match="the search is broken"):
        idle.close()
    idle.close()  # told once
    assert idle.meter.steps == 0


def test_an_idle_search_rests_after_its_time_and_wakes_with_the_next_text(load: Opener) -> None:
    model = without_no_ops(load)
    search = Search(space(model), FixedCosts(), patience=10**6)
    with IdleSearch(model, search, Windows(model, n=16), limit_s=0.05) as idle:
        made = []
        for _ in range(2):
            with idle.paused():
                run(model, PROMPT, 40)
            time.sleep(0.4)
            made.append(idle.meter.steps)
            time.sleep(0.2)
            assert idle.meter.steps == made[-1] > 0
            with idle.paused(renews=False):
                pass
            time.sleep(0.1)
            assert idle.meter.steps == made[-1]
    assert made[1] > made[0]


# -- profiles and speculation ----------------------------------------------------------------------


def converse(model: Model, speculation: Speculation, n: int = 60) -> list[int]:
    search = speculation.begin(len(PROMPT))
    return run(model, PROMPT, n, drafter=speculation.drafter, search=search)


def learn(model: Model, store: Store, *, steps: int = 120) -> tuple[Speculation, Learning]:
    """A first run with an empty profile."""
    speculation = Speculation(model, SpeculationOptions(mode="layer-skip"), store=store)
    assert speculation.learning is not None
    assert speculation.learning.searcher is not None
    if not speculation.learning.is_measured:
        assert speculation.learning.measure_in_idle()
    assert model.n_past == 0
    converse(model, speculation)
    write(model)
    for window in windows_of(model, steps):
        speculation.learning.searcher.step(window)
        speculation.learning.meter.steps += 1
        speculation.learning.meter.seconds += 0.25
    return speculation, speculation.learning


def test_what_one_run_learned_the_next_begins_with(
    load: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "Budget", partial(Budget, waited=lambda: 0.0))
    model, store = with_no_ops(load), Store(tmp_path)
    speculation, first = learn(model, store)
    at_once = store.load(fingerprint(model.path))
    assert at_once is not None
    assert [Costs.from_dict(costs).is_sure for costs in at_once.costs.values()] == [True]
    assert not at_once.known
    speculation.save()
    stored = store.load(fingerprint(model.path))
    assert stored is not None
    assert stored.evaluations == first.meter.steps >= 120
    assert stored.search_s == pytest.approx(first.meter.seconds)
    assert first.best in {known.subnetwork for known in stored.known}
    assert isinstance(first.searcher, Search)
    assert [item.subnetwork for item in stored.known] == [
        item.subnetwork for item in first.searcher.knowledge()
    ]

    speculation.save()  # nothing has happened since
    assert store.load(fingerprint(model.path)) == stored

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the costs are known already")

    monkeypatch.setattr(learning, "Measurement", refuse)
    monkeypatch.setattr(learning, "estimated", refuse)
    options = SpeculationOptions(mode="layer-skip")
    later = Speculation(with_no_ops(load), options, store=Store(tmp_path))
    assert later.learning is not None
    assert later.learning.costs == first.here.refreshed()
    assert not later.learning.measure_in_idle()
    assert later.learning.best == stored.known[0].subnetwork
    assert later.why == f"layer-skip (found by search): {later.learning.best}"
    assert later.learning.best_known is not None
    assert later.learning.best_known.rate.positions >= stored.known[0].positions
    assert later.why != speculation.why
    later.save()  # it has only read
    again = store.load(fingerprint(model.path))
    assert again is not None
    assert {k.subnetwork: k for k in again.known} == {k.subnetwork: k for k in stored.known}
    assert again.known[0] == stored.known[0]
    assert (again.evaluations, again.search_s) == (stored.evaluations, stored.search_s)


def test_costs_of_a_busy_machine_are_measured_again(
    load: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, waited = Store(tmp_path), 0.0

    def wait() -> float:
        nonlocal waited
        return waited

    def learning_of(model: Model) -> Learning:
        return Learning(model, None, store=store)

    def count_time() -> float:
        nonlocal waited
        waited += 0.5 * is_busy
        return time.perf_counter()

    monkeypatch.setattr(learning, "Budget", partial(Budget, waited=wait, clock=count_time))
    model, is_busy = with_no_ops(load), True
    first = learning_of(model)
    assert first.costs.is_estimate
    assert first.measure_in_idle()
    assert first.costs.is_busy
    first.save()
    again = learning_of(model)
    assert again.costs == first.costs
    write(model)
    assert again.measure_in_idle()  # still busy
    assert again.costs.is_busy
    assert not again.measure_in_idle()  # not before the next answer
    is_busy = False
    again.begin()
    assert again.measure_in_idle()
    assert again.costs.is_sure
    again.begin()
    assert not again.measure_in_idle()
    model.clear()
    quiet = learning_of(model)
    assert quiet.costs == again.costs
    first.save()  # what was measured under load comes last, and is not what stays
    assert learning_of(model).costs == again.costs


@pytest.mark.parametrize("number", [0, 5, 20])
def test_what_was_measured_is_kept_also_if_that_is_interrupted(
    load: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    clock = iter(range(1000))

    def tick() -> float:
        if next(clock) == 2 * number:
            raise KeyboardInterrupt
        return time.perf_counter()

    monkeypatch.setattr(learning, "Budget", partial(Budget, clock=tick))
    model, store = with_no_ops(load), Store(tmp_path)
    learned = Learning(model, None, store=store)
    with pytest.raises(KeyboardInterrupt):
        learned.measure_in_idle()
    assert model.n_past == 0
    stored = store.load(fingerprint(model.path))
    assert (stored is not None) == (number >= 5)
    assert learned.costs.is_estimate == (number < 5)


def test_nothing_is_timed_before_the_first_answer_and_its_passes_tell_what_they_cost(
    load: Opener, tmp_path: Path
) -> None:
    model, store = with_no_ops(load), Store(tmp_path)
    speculation = Speculation(model, store=store)
    assert model.n_passes == 0
    assert speculation.learning is not None
    assert speculation.why == NOT_TIMED
    converse(model, speculation, 2)
    assert speculation.learning.costs.is_estimate
    deadline = time.monotonic() + 60  # passes of a busy machine tell nothing
    while speculation.learning.costs.is_estimate:
        assert time.monotonic() < deadline
        converse(model, speculation)
    assert not speculation.learning.costs.is_sure
    speculation.save()
    again = Speculation(model, store=store)
    assert again.learning is not None
    assert not again.learning.costs.is_estimate
    assert again.learning.costs.pass_ms[0][0] == 1
    assert again.learning.measure_in_idle()  # goes on; whether it is sure then, the machine decides


def test_idle_measuring_stops_at_once_and_goes_on_later(load: Opener, tmp_path: Path) -> None:
    """Also where there is nothing to search; and the text in the context stays as it is."""
    model, options = with_no_ops(load), SpeculationOptions(mode="ngram")
    speculation = Speculation(model, options, store=Store(tmp_path))
    write(model)
    text = list(model.tokens)
    idle = speculation.idle_search()
    assert idle is not None
    assert speculation.learning is not None
    waits, deadline = [], time.monotonic() + 60
    with idle:
        while not speculation.learning.is_measured:
            assert time.monotonic() < deadline
            time.sleep(0.002)
            speculation.learning.begin()  # a busy machine: look again
            start = time.perf_counter()
            with idle.paused():
                waits.append(time.perf_counter() - start)
                assert model.tokens == text
    assert sorted(waits)[len(waits) // 2] < 0.05
    assert speculation.idle_search() is None  # once and never again


def test_two_runs_add_up(load: Opener, tmp_path: Path) -> None:
    store, steps = Store(tmp_path), 0
    for _ in range(2):
        model = with_no_ops(load)
        speculation, learned = learn(model, store, steps=30)
        for _ in range(2):
            speculation.save()
        steps += learned.meter.steps
        stored = store.load(fingerprint(model.path))
        assert stored is not None
        assert stored.evaluations == steps


def test_costs_measured_again_are_what_the_search_counts_in(load: Opener, tmp_path: Path) -> None:
    _, learned = learn(without_no_ops(load), Store(tmp_path), steps=0)
    learned.measure_costs()
    assert isinstance(learned.searcher, Search)
    assert learned.searcher.objective.costs is learned.here


def speculate(model: Model, folder: Path, **options: Any) -> Speculation:
    return Speculation(model, SpeculationOptions(**options), store=Store(folder))


def test_switched_off_nothing_is_touched(load: Opener, tmp_path: Path) -> None:
    model = without_no_ops(load)
    speculation = speculate(model, tmp_path, mode="off")
    assert (speculation.drafter, speculation.learning) == (None, None)
    assert speculation.why == "switched off"
    assert speculation.begin(len(PROMPT)) is None
    assert speculation.idle_search() is None
    speculation.save()
    assert not any(tmp_path.iterdir())


def test_a_model_that_cannot_roll_back(load: Opener, tmp_path: Path) -> None:
    model = load("mamba")
    for options in ({"mode": "layer-skip"}, {"skip_ffn": frozenset([1])}):
        with pytest.raises(UnsupportedModelError, match="--speculation off"):
            speculate(model, tmp_path, **options)
    speculation = speculate(model, tmp_path)
    assert (speculation.drafter, speculation.learning) == (None, None)
    assert speculation.why == model.rollback_refusal
    assert len(run(model, PROMPT, 10, drafter=speculation.drafter)) == 10


def test_a_sub_network_by_hand_is_kept(load: Opener, tmp_path: Path) -> None:
    model = with_no_ops(load)
    by_hand = {"skip_attn": PLANTED.skip_attn, "skip_ffn": PLANTED.skip_ffn}
    for more in ({}, {"p_min": 0.1}):
        speculation = speculate(model, tmp_path, **by_hand, **more)
        assert speculation.drafter is not None
        assert speculation.enabled
        assert speculation.why == f"layer-skip as given: {PLANTED}"
        assert speculation.begin(len(PROMPT)) is None  # nothing to search
        stats = Stats()
        run(model, PROMPT, 60, drafter=speculation.drafter, stats=stats)
        assert stats.drafted > 0
        assert stats.acceptance_rate == 1.0


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"skip_ffn": frozenset([2, 77])}, "layer 77 does not exist"),
        ("apertus", {"skip_ffn": frozenset([1, 2])}, "cannot skip FFN 1-2: this architecture"),
    ],
)
def test_layers_that_cannot_be_skipped_are_named(
    family: str, options: dict[str, Any], words: str, load: Opener, tmp_path: Path
) -> None:
    with pytest.raises(SubnetworkError, match=words) as caught:
        speculate(load(family), tmp_path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("search", ["auto", "paper", "off"])
def test_every_search_and_tree_gives_the_same_text(
    tree: str, search: str, load: Opener, tmp_path: Path
) -> None:
    model, plain = without_no_ops(load), without_no_ops(load)
    speculation = speculate(
        model,
        tmp_path,
        mode="layer-skip",
        search=search,
        paper=PaperOptions(bayes=False, context_window=8),
        tree=tree,
        p_min=0.2,
    )
    stats = Stats()
    beside = speculation.begin(len(PROMPT))
    assert (beside is None) == (search == "off")
    tokens = run(model, PROMPT, 120, drafter=speculation.drafter, search=beside, stats=stats)
    assert tokens == run(plain, PROMPT, 120)
    assert stats.drafted > 0


def test_a_search_does_not_end_a_text_before_the_context_does(load: Opener) -> None:
    model, plain = without_no_ops(load, n_ctx=256), without_no_ops(load, n_ctx=256)
    windows = Windows(model, n=16)
    windows.first = len(PROMPT)
    search = Search(space(model), FixedCosts(), patience=10**6)
    driver, stats = OnTheFly(search, windows, cost_s=lambda: 0.0, share=1e3), Stats()
    assert run(model, PROMPT, 1000, search=driver, stats=stats) == run(plain, PROMPT, 1000)
    assert stats.stop_reason == "context"


def test_the_paper_s_search_drafts_in_mode_auto(load: Opener, tmp_path: Path) -> None:
    model = with_no_ops(load)
    speculation = speculate(
        model, tmp_path, search="paper", paper=PaperOptions(bayes=False), p_min=0.5
    )
    stats = Stats()
    search = speculation.begin(len(PROMPT))
    run(model, PROMPT, 200, drafter=speculation.drafter, search=search, stats=stats)
    assert stats.drafted > 0


def test_an_idle_search_learns_from_no_later_prompt(load: Opener, tmp_path: Path) -> None:
    model = without_no_ops(load)
    speculation = speculate(model, tmp_path, mode="layer-skip")
    idle = speculation.idle_search()
    assert idle is not None
    scored: list[int] = []
    redecode = model.redecode

    def watched(start: int, n: int, **options: Any) -> None:
        scored.append(start)
        redecode(start, n, **options)

    model.redecode = watched  # type: ignore[method-assign]
    prompt = list(range(5, 205))
    with idle:
        with idle.paused():
            run(model, prompt, 12, search=speculation.begin(len(prompt)))
            scored.clear()
        deadline = time.monotonic() + 5
        while not scored and time.monotonic() < deadline:
            time.sleep(0.01)
    assert scored
    assert min(scored) >= len(prompt) - 1


# -- drawn drafts ----------------------------------------------------------------------------------

SKIPPING = SubNetwork(n_layer=4, skip_attn=frozenset([1]), skip_ffn=frozenset([2]))
DRAWN = SamplingOptions(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
WARM = replace(DRAWN, temperature=0.7)


def drawn(
    model: Model,
    options: SamplingOptions,
    n: int,
    *,
    shape: Shape = TREES["chain"],
    stats: Stats | None = None,
) -> list[int]:
    with SpeculativeSampler(model, options, prompt=PROMPT) as sampler:
        drafter = LayerSkip(model, SKIPPING, shape=shape, sampler=sampler)
        return run(model, PROMPT, n, sampler=sampler, drafter=drafter, stats=stats)


@pytest.mark.parametrize("shape", TREES.values(), ids=TREES)
def test_a_seed_determines_a_drawn_text(shape: Shape, load: Opener) -> None:
    model = load()
    for options in (
        WARM,
        SamplingOptions(repeat_penalty=1.2),
        SamplingOptions(temperature=1.5, grammar="root ::= [a-z]+"),
    ):
        texts, drafts = [], 0
        for seed in (1, 1, 2):
            stats = Stats()
            texts.append(drawn(model, replace(options, seed=seed), 60, shape=shape, stats=stats))
            drafts += stats.accepted
            assert len(texts[-1]) == 60 or stats.stop_reason == "eos"
        assert texts[0] == texts[1] != texts[2]
        assert drafts > 0


@pytest.mark.parametrize("shape", TREES.values(), ids=TREES)
def test_at_temperature_0_drawn_text_is_greedy_text(shape: Shape, load: Opener) -> None:
    model, plain = (load(quant=INVARIANT) for _ in range(2))
    assert drawn(model, GREEDY, 80, shape=shape) == run(plain, PROMPT, 80)
    assert model.tokens == plain.tokens


def test_drawn_drafts_obey_the_grammar_along_their_paths(load: Opener) -> None:
    model = load()
    options = replace(DRAWN, grammar="root ::= ([a-m] [n-z])+", seed=1)
    depths: list[int] = []

    def check(cycle: Cycle) -> None:
        tree = cycle.tree
        for node in range(len(tree)):
            path = [token for token in tree.path(node) if not model.is_eog(token)]
            letters = "".join(VOCAB.tokens[token] for token in path)
            assert all((a <= "m") != (b <= "m") for a, b in pairwise(letters)), letters
            depths.append(len(path))

    with SpeculativeSampler(model, options) as sampler:
        drafter = LayerSkip(model, SKIPPING, shape=TREES["best-first"], sampler=sampler)
        drafter.watch(check)
        run(model, PROMPT, 60, sampler=sampler, drafter=drafter)
    assert max(depths) >= 2


def test_a_drawn_text_ends_with_the_context(load: Opener) -> None:
    model = load()
    for seed in range(20):
        stats = Stats()
        drawn(model, replace(DRAWN, seed=seed), 1000, shape=TREES["best-first"], stats=stats)
        if stats.stop_reason == "context":
            assert model.n_past == model.n_ctx
            return
    pytest.fail("every text ended by itself")


# -- the law of drawn text -------------------------------------------------------------------------

N_TEXTS = 1000
LENGTH = 5
"""So that the second and third token come from a draft of three, or from after it."""


class Law:
    """Exact probabilities of a model's texts, from its own logits, in numpy."""

    def __init__(self, model: Model, temperature: float) -> None:
        self._model, self._temperature = model, temperature

    def after(self, text: Sequence[int]) -> NDArray[np.float64]:
        model = self._model
        tokens = [*PROMPT, *text]
        model.clear()
        model.decode(tokens)
        logits = model.logits(0).astype(np.float64) / self._temperature
        weights = np.exp(logits - logits.max())
        return np.asarray(weights / weights.sum())

    def texts(self, n: int, at_least: float) -> dict[tuple[int, ...], float]:
        """All texts of n tokens that are at least so likely; none with an end of generation."""
        found: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(n):
            found = {
                (*text, token): p * q
                for text, p in found.items()
                for token, q in enumerate(self.after(text))
                if p * q >= at_least and not self._model.is_eog(token)
            }
        return found


def surprise(texts: Sequence[Sequence[int]], law: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic in standard deviations from its mean; all else is one cell."""
    counts = Counter(tuple(text) if tuple(text) in law else None for text in texts)
    expected: dict[tuple[int, ...] | None, float] = {k: len(texts) * p for k, p in law.items()}
    expected[None] = len(texts) * (1 - sum(law.values()))
    assert min(expected.values()) >= 5
    statistic = sum((counts[cell] - mean) ** 2 / mean for cell, mean in expected.items())
    freedom = len(expected) - 1
    assert freedom >= 10, "too few to tell"
    return (statistic - freedom) / math.sqrt(2 * freedom)


Rule = Callable[[Distribution, "Distribution | None", Sequence[int], np.random.Generator], int]


def take_the_first_child(
    p: Distribution, q: Distribution | None, children: Sequence[int], rng: np.random.Generator
) -> int:
    return children[0] if children else draw(p, rng)


def forget_the_residual(
    p: Distribution, q: Distribution | None, children: Sequence[int], rng: np.random.Generator
) -> int:
    """Draws from the target itself after a rejection."""
    for child in children[:1]:
        if q is not None and rng.random() < p.of(child) / q.of(child):
            return child
    return draw(p, rng)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tree", "controls"),
    [
        ("chain", {take_the_first_child: 40, forget_the_residual: 5}),
        ("best-first", {take_the_first_child: 40}),
    ],
    ids=["chain", "best-first"],
)
def test_drawn_texts_follow_the_target_s_law(
    tree: str, controls: dict[Rule, float], load: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The joint law of the first three tokens; wrong rules are noticed."""
    model = load(n_ctx=256)
    law = Law(model, WARM.temperature).texts(3, 5 / N_TEXTS)

    def sample() -> tuple[float, Stats]:
        texts, stats = [], Stats()
        for seed in range(N_TEXTS):
            options = replace(WARM, seed=seed)
            texts.append(drawn(model, options, LENGTH, shape=TREES[tree], stats=stats)[:3])
        return surprise(texts, law), stats

    deviation, stats = sample()
    assert 0.1 < stats.acceptance_rate < 0.9
    assert deviation < 3
    for rule, at_least in controls.items():
        monkeypatch.setattr(sampling, "choose", rule)
        assert sample()[0] > at_least


def test_an_idle_search_gets_on_while_the_text_stands_still(load: Opener) -> None:
    """The windows of one text are enough to find what contributes nothing."""
    model = with_no_ops(load)
    run(model, PROMPT, 180)
    windows = Windows(model, n=32, steps=8)
    windows.first = len(PROMPT)
    search = Search(space(model), FixedCosts())
    keys = set()
    for _ in range(400):
        window = windows()
        assert window is not None
        keys.add(window.key)
        search.step(window)
    assert len(keys) >= 4
    assert search.best.skip_attn or search.best.skip_ffn
    assert search.rate(search.best).agreement == 1.0
