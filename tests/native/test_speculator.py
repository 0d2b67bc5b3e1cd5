"""The speculator: the choices of Python's planner, several sequences, what it keeps and refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from swift_gguf.drafting.ngram import NGram
from swift_gguf.drafting.passes import Passes
from swift_gguf.drafting.recycling import Recycling
from swift_gguf.drafting.source import Cycle
from swift_gguf.drafting.tree import Shape, Tree
from swift_gguf.drafting.verification import verify
from swift_gguf.learning.profile import Known, Profile, Seen, Store
from swift_gguf.model.model import Model
from swift_gguf.planning.calibration import Calibration
from swift_gguf.planning.cost import Costs, CostsHere, costs_key, stored_costs
from swift_gguf.planning.economy import PRIORS
from swift_gguf.planning.measuring import estimated
from swift_gguf.planning.planner import Drafts, Planner
from swift_gguf.subnetwork import SubNetwork
from tests.native.speculators import Speculator

Tiny = Callable[..., Path]
Opener = Callable[..., Model]

Drafted = list[list[int]]

N_LAYER = 4
NOOP = SubNetwork(n_layer=N_LAYER, skip_ffn=frozenset({1, 3}))
"""What `tiny("llama", noop_ffn=(1, 3))` does without."""
COSTS = Costs(
    pass_ms=((1, 4000.0), (2, 4300.0), (3, 4700.0), (4, 5000.0), (8, 7000.0)),
    attention_ms=(100.0,) * N_LAYER,
    ffn_ms=(800.0,) * N_LAYER,
    kv_ms=(0.1,) * N_LAYER,
    head_ms=400.0,
    n_kv=0,
    row_ms=20.0,
    switch_ms=10.0,
).scaled(1e6)
"""Of a machine so slow that the time of the planner itself is nothing."""
SEEN = Seen(agrees=(True,) * 60 + (False,) * 10, confidence=(0.8,) * 70)
FINGERPRINT = "0" * 32


def profile_at(folder: Path, model: Model, costs: Costs | None, known: bool = True) -> Path:
    store = Store(folder)
    assert store.add(
        Profile(
            fingerprint=FINGERPRINT,
            model="tiny",
            n_layer=N_LAYER,
            known=(Known(subnetwork=NOOP, seen={"1": SEEN}),) if known else (),
            costs={costs_key(model, costs): costs.as_dict()} if costs else {},
        )
    )
    return store.path(FINGERPRINT)


@pytest.fixture
def speculators() -> Iterator[Callable[..., Speculator]]:
    made: list[Speculator] = []

    def make(model: Model, profile: Path | None = None) -> Speculator:
        made.append(Speculator(model, profile))
        return made[-1]

    yield make
    for speculator in made:
        speculator.close()


# -- the same choices as Python's planner ----------------------------------------------------------


@dataclass
class Replay:
    """Recorded answers, replayed through both planners on contexts of their own, up to the first
    difference."""

    python: Planner
    native: Speculator
    models: tuple[Model, Model]
    curve: Costs
    seed: int = 0

    def answer(
        self, prompt: list[int], answer: list[int]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The drafts of both, cycle by cycle.  Python's are verified."""
        chance = random.Random(self.seed)
        for model in self.models:
            model.clear()
            model.decode(prompt)
        self.python.begin()
        self.native.begin()
        ours, theirs = [], []
        text, end = [*prompt, answer[0]], len(prompt) + len(answer)
        recorded = prompt + answer
        while len(text) < end - 1:
            n_max = end - len(text) - 1
            tree = self.python.draft(text[-1], n_max=n_max)
            drafting_ms = chance.uniform(0.8, 1.5) * sum(self.python._expected_ms.values())
            (native,) = self.native.draft(text, n_max=n_max)
            ours.append(tree.tokens)
            theirs.append(native)
            if native != tree.tokens:
                break
            pass_ms = self.curve.verify_ms(len(tree) + 1) * chance.uniform(0.9, 1.2)
            chosen = self._verified(tree, recorded, len(text), drafting_ms, pass_ms)
            self.native.passed(drafting_ms, pass_ms)
            assert self.native.learn(0, len(chosen)) == 0
            self.native.accept(chosen)
            text += chosen
        return ours, theirs

    def _verified(
        self, tree: Tree, recorded: list[int], at: int, drafting_ms: float, pass_ms: float
    ) -> list[int]:
        path = iter(recorded[at:])
        verdict = verify(tree, choose=lambda _: next(path), is_eog=lambda _: False)
        for model in self.models:
            model.decode_tree([recorded[at - 1], *tree.tokens], range(-1, len(tree)))
            model.keep(range(len(verdict.tokens)))
        cycle = Cycle(tree, verdict, draft_s=drafting_ms / 1e3, verify_s=pass_ms / 1e3)
        self.python.observe(cycle)
        return verdict.tokens


def own_text(model: Model, prompt: list[int], n: int) -> list[int]:
    """What the model writes."""
    model.clear()
    model.decode(prompt)
    text: list[int] = []
    for _ in range(n):
        text += model.top(-1)[0]
        model.decode(text[-1:])
    return text


def answers(model: Model) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers of several kinds: copied, new, the model's own, and mixed."""
    chance = random.Random(7)
    words = [[chance.randrange(10, 60) for _ in range(chance.randrange(2, 9))] for _ in range(12)]

    def said(n: int) -> list[int]:
        return [token for _ in range(n) for token in chance.choice(words)]

    def new(n: int) -> list[int]:
        return [chance.randrange(10, model.n_vocab) for _ in range(n)]

    prompts = [said(8), new(20), new(6), said(6)]
    return [
        (prompts[0], said(30)),
        (prompts[1], new(60)),
        (prompts[2], own_text(model, prompts[2], 80)),
        (prompts[3], said(6) + new(20) + said(10) + [11, 12] * 20),
        (prompts[0], said(30)),
    ]


@pytest.mark.parametrize("sources", ["lookups", "all"])
@pytest.mark.parametrize("start", ["measured", "estimated"])
def test_recorded_answers_get_the_drafts_of_pythons_planner(
    sources: str,
    start: str,
    tiny: Tiny,
    open_model: Opener,
    speculators: Callable[..., Speculator],
    tmp_path: Path,
) -> None:
    path = tiny("llama", quant="Q8_0", noop_ffn=(1, 3))
    models = open_model(path, n_ctx=512), open_model(path, n_ctx=512)
    recorded = answers(models[0])
    for model in models:
        model.clear()
    costs = COSTS if start == "measured" else None
    profile = profile_at(tmp_path, models[1], costs, known=sources == "all")
    here, calibration = CostsHere(models[0], costs or estimated(models[0])), Calibration(PRIORS)
    drafts = []
    if sources == "all":
        calibration.recall("layer-skip", SEEN.agrees, SEEN.confidence)
        skipping = Passes("layer-skip", models[0], NOOP)
        drafts.append(Drafts(skipping, lambda: here.draft_ms(NOOP)))
    planner = Planner(
        models[0],
        here,
        lookups=[NGram(), Recycling()],
        drafts=drafts,
        calibration=calibration,
        shape=Shape(n_nodes=0),
    )
    replay = Replay(planner, speculators(models[1], profile), models, COSTS)
    n_drafted = n_skipped = 0
    for number, (prompt, answer) in enumerate(recorded):
        replay.seed = number
        ours, theirs = replay.answer(prompt, answer)
        assert theirs == ours, number
        n_drafted += sum(map(len, ours))
        n_skipped += sum(not draft for draft in ours)
    assert n_drafted > 50  # there were choices
    assert n_skipped > 20


def test_other_costs_are_other_choices(
    tiny: Tiny, open_model: Opener, speculators: Callable[..., Speculator], tmp_path: Path
) -> None:
    """The control of the test above."""
    path = tiny("llama", quant="Q8_0", noop_ffn=(1, 3))
    models = open_model(path, n_ctx=512), open_model(path, n_ctx=512)
    recorded = answers(models[0])
    dear = replace(COSTS, pass_ms=((1, 4e9), (2, 5.5e9), (8, 14e9)))
    profile = profile_at(tmp_path, models[1], dear, known=False)
    planner = Planner(
        models[0],
        CostsHere(models[0], COSTS),
        lookups=[NGram(), Recycling()],
        calibration=Calibration(PRIORS),
        shape=Shape(n_nodes=0),
    )
    replay = Replay(planner, speculators(models[1], profile), models, COSTS)
    ours, theirs = replay.answer(*recorded[0])
    assert theirs != ours


# -- several sequences -----------------------------------------------------------------------------


def test_a_draft_pays_by_the_rows_of_all_sequences(
    tiny: Tiny, open_model: Opener, speculators: Callable[..., Speculator], tmp_path: Path
) -> None:
    """Three rows are cheap here, the others cost a pass each."""
    model = open_model(tiny("llama", quant="Q8_0"))
    steep = replace(COSTS, pass_ms=((1, 4e9), (2, 4.1e9), (3, 4.2e9), (4, 8e9), (8, 24e9)))
    speculator = speculators(model, profile_at(tmp_path, model, steep, known=False))
    texts = [[10, *[20 + i, 40, 50, 60] * 6] for i in range(3)]
    for seq_id in range(3):
        speculator.begin(seq_id)
    assert [len(draft) for draft in speculator.draft(texts[0])] == [2]
    assert sum(len(draft) for draft in speculator.draft(*texts[:2])) == 1
    assert sum(len(draft) for draft in speculator.draft(*texts)) == 0
    assert sum(len(draft) for draft in speculator.draft(texts[0], n_others=2)) == 0


# -- what it keeps ---------------------------------------------------------------------------------


def test_what_was_learned_is_in_the_profile_for_both(
    tiny: Tiny, open_model: Opener, speculators: Callable[..., Speculator], tmp_path: Path
) -> None:
    path = tiny("llama", quant="Q8_0", noop_ffn=(1, 3))
    model = open_model(path)
    profile = Store(tmp_path).path(FINGERPRINT)
    speculator = speculators(model, profile)  # there is none yet
    assert speculator.why == "no pass was timed yet"
    assert speculator.measure(0.5) == 0
    speculator.begin()
    model.decode([5])
    speculator.draft([5, 6])
    model.decode([6])
    assert speculator.learn(0, 1) == 0
    speculator.accept([7])
    assert speculator.save() == ""
    stored = Store(tmp_path).load(FINGERPRINT)
    assert stored is not None
    costs = stored_costs(model, stored.costs)
    assert costs is not None
    assert not costs.is_estimate
    assert dict(costs.pass_ms).keys() == {1, 2, 3, 4, 6, 8}
    successors, _ = model.top(-1, 4)
    assert [row[:2] for row in stored.recycling] == [[[6], successors], [[5, 6], successors]]
    # what Python knew stays, and the latest comes last
    profile_at(tmp_path, model, None)
    assert speculator.save() == ""
    again = Store(tmp_path).load(FINGERPRINT)
    assert again is not None
    assert [known.subnetwork for known in again.known] == [NOOP]
    assert again.recycling == stored.recycling
    # read again, costs are known at once
    assert "n-grams" not in speculators(model, profile).why
    assert "timed" not in speculators(model, profile).why


def test_costs_that_are_trusted_more_stay(
    tiny: Tiny, open_model: Opener, speculators: Callable[..., Speculator], tmp_path: Path
) -> None:
    model = open_model(tiny("llama", quant="Q8_0"))
    profile = Store(tmp_path).path(FINGERPRINT)
    speculator = speculators(model, profile)
    assert speculator.measure(0.2) == 0
    profile_at(tmp_path, model, COSTS)
    assert speculator.save() == ""
    stored = Store(tmp_path).load(FINGERPRINT)
    assert stored is not None
    assert list(stored.costs.values()) == [COSTS.as_dict()]


# -- what it refuses -------------------------------------------------------------------------------

DAMAGED = {
    "empty": "",
    "deep": "[" * 200_000,
    "another version": {"version": 2},
    "another model": {"n_layer": 5},
    "no costs": {"costs": None},
    "costs of words": {"costs": {"KEY": {"pass_ms": "much"}}},
    "costs of nothing": {"costs": {"KEY": COSTS.as_dict() | {"pass_ms": [[1, 0]]}}},
    "costs of other layers": {"costs": {"KEY": COSTS.as_dict() | {"ffn_ms": [1.0]}}},
    "tokens beyond": {"recycling": [[[1 << 20], [1], [0.5]]]},
    "rows of words": {"recycling": [["a", "b", "c"]]},
    "sub-network": {"known": [{"skip_attn": "9", "skip_ffn": "", "seen": {"1": {}}}]},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_profile_that_cannot_be_used_is_refused_in_words(
    content: str | dict[str, object], tiny: Tiny, open_model: Opener, tmp_path: Path
) -> None:
    model = open_model(tiny("llama", quant="Q8_0"))
    path = profile_at(tmp_path, model, COSTS)
    if isinstance(content, dict):
        key = costs_key(model, COSTS)
        changed = json.dumps(json.loads(path.read_text()) | content).replace("KEY", key)
        path.write_text(changed)
    else:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"profile|layers|widths|times?\b"):
        Speculator(model, path)


def test_a_model_that_cannot_go_back_is_refused(tiny: Tiny, open_model: Opener) -> None:
    with pytest.raises(ValueError, match="state"):
        Speculator(open_model(tiny("mamba")))


def test_bad_arguments_are_codes(
    tiny: Tiny, open_model: Opener, speculators: Callable[..., Speculator]
) -> None:
    model = open_model(tiny("llama"))
    speculator = speculators(model)
    for text in ([], [model.n_vocab], [-1]):
        with pytest.raises(AssertionError):
            speculator.draft(text)
    assert speculator.learn(0, 1) == -1  # there is no draft yet
    model.decode([5])
    assert speculator.measure(0.1) == -1  # the context is not empty
    assert speculator.draft([5, 6], n_max=0) == [[]]
    assert "profile" in speculator.save()
