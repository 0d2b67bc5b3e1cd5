"""The engine on a fake target: text, context and sampler calls are those of plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, product
from time import sleep
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_gguf import engine
from swift_gguf.drafting.tree import Tree
from swift_gguf.engine import TARGET, Token, choose, generate
from swift_gguf.errors import ContextFullError, DecodeError, UnsupportedModelError
from swift_gguf.stats import Stats
from tests.fixtures.controls import accept_drafts
from tests.unit.fake_model import (
    DrafterError,
    FakeModel,
    GreedySampler,
    SamplerError,
    ScriptedDrafter,
    SeededSampler,
    TreeDrafter,
    decode_plainly,
    shapes,
)

# Every acceptance pattern of up to 4 tokens, ends of generation included up to 3; of 5 and 6
# tokens, every number of accepted ones.
SCRIPTS = [
    *("".join(letters) for n in range(4) for letters in product("rwe", repeat=n)),
    *("".join(letters) for letters in product("rw", repeat=4)),
    *("r" * n + "w" + "r" * (length - n - 1) for length in (5, 6) for n in range(length)),
    *("r" * length for length in (5, 6)),
]
FEW_SCRIPTS = ["", "r", "w", "rw", "rrr", "rre", "rrrrwr", "rrrrrr"]
PROMPT = (5, 6, 7)


# -- the measure -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """A generation, whoever runs it."""

    prompt: tuple[int, ...] = PROMPT
    eog_after: int | None = None
    """The target ends after as many tokens."""
    max_tokens: int | None = None
    n_ctx: int = 24
    n_vocab: int = 32
    seed: int | None = None
    """None: greedy."""
    stop_after: int | None = None
    """The consumer closes the generator after as many tokens."""

    def model(self, kind: Callable[..., FakeModel] = FakeModel, **options: Any) -> FakeModel:
        eog_at = () if self.eog_after is None else (len(self.prompt) + self.eog_after,)
        return kind(n_vocab=self.n_vocab, n_ctx=self.n_ctx, eog_at=eog_at, **options)

    def sampler(self, **options: Any) -> GreedySampler:
        if self.seed is None:
            return GreedySampler(**options)
        return SeededSampler(self.seed, **options)


class Expected(NamedTuple):
    tokens: list[int]
    stop_reason: str
    context: list[int]
    calls: list[Any]


@cache
def plain(job: Job) -> Expected:
    model, sampler = job.model(), job.sampler()
    tokens, reason = take(
        decode_plainly(model, job.prompt, sampler, job.max_tokens), job.stop_after
    )
    return Expected(tokens, reason or "", model.tokens, sampler.calls)


def take(items: Iterator[Any], n: int | None = None) -> tuple[list[Any], str | None]:
    """What a consumer gets who closes the generator after n items, and what it returns."""
    generator = cast("Generator[Any, None, str | None]", items)
    taken: list[Any] = []
    while n is None or len(taken) < n:
        try:
            taken.append(next(generator))
        except StopIteration as end:
            return taken, end.value
    generator.close()
    return taken, "stopped" if taken else ""  # a generator that never ran knows of nothing


def assert_same_as_plain(
    job: Job,
    script: Sequence[str] | None,
    *,
    draft_max: int = 6,
    kind: Callable[..., FakeModel] = FakeModel,
) -> None:
    """The one check of all below: text, stop reason, context, sampler, labels, statistics."""
    expected = plain(job)
    model, sampler, stats = job.model(kind), job.sampler(), Stats()
    drafter = ScriptedDrafter(model, sampler, script) if script is not None else None
    tokens, _ = take(
        generate(
            model,
            job.prompt,
            sampler=sampler,
            drafter=drafter,
            draft_max=draft_max,
            max_tokens=job.max_tokens,
            stats=stats,
        ),
        job.stop_after,
    )
    ids = [token.id for token in tokens]
    assert ids == expected.tokens
    assert stats.stop_reason == expected.stop_reason
    assert model.tokens == expected.context
    whole = expected.stop_reason not in ("", "stopped")
    assert sampler.calls == expected.calls  # none ahead of its time, where a consumer stops early

    drafts = drafter.calls if drafter else []
    labels = [TARGET] * len(ids)
    for call in drafts:
        seen = [*call.context, call.pending]
        assert seen == [*job.prompt, *ids][: len(seen)]
        done = len(seen) - len(job.prompt)
        assert call.n_max <= min(draft_max, job.n_ctx - len(seen))
        assert job.max_tokens is None or done + call.n_max < job.max_tokens
        for n, token in enumerate(call.tokens, done):
            if n >= len(ids) or token != ids[n]:
                break
            labels[n] = "scripted"
    assert [token.source for token in tokens] == labels

    assert model.decodes[1:] == [(n, n) for n, _ in model.decodes[1:]]
    assert stats.cycles == max(0, len(model.decodes) - 1)
    assert stats.predicted_n == len(ids)
    assert stats.prompt_n == (len(job.prompt) if model.decodes else 0)
    assert stats.drafted == sum(len(call.tokens) for call in drafts)
    assert stats.accepted <= stats.drafted
    assert stats.accepted >= labels.count("scripted")
    for source in stats.sources.values():
        lengths = source.accepted_lengths
        assert sum(lengths.values()) == source.drafts
        assert sum(n * count for n, count in lengths.items()) == source.accepted
    if whole:
        # an end of generation may be accepted, but is not yielded
        ends = stats.stop_reason == "eos"
        assert stats.accepted - labels.count("scripted") in (0, int(ends))
        drawn = stats.predicted_n + (stats.stop_reason == "eos")
        assert drawn == pytest.approx(1 + stats.cycles * stats.mean_acceptance_length)


def ids_of(
    job: Job, script: Sequence[str], kind: Callable[..., FakeModel] = FakeModel
) -> list[int]:
    model, sampler = job.model(kind), job.sampler()
    drafter = ScriptedDrafter(model, sampler, script)
    options: dict[str, Any] = {"sampler": sampler, "drafter": drafter, "draft_max": 6}
    return [t.id for t in generate(model, job.prompt, max_tokens=job.max_tokens, **options)]


# -- same as plain ---------------------------------------------------------------------------------


def test_plain_decoding_leaves_what_the_docstring_says() -> None:
    for eog_after, max_tokens, room in product((None, 0, 1, 4), (None, 1, 3, 4, 5), (0, 1, 3, 9)):
        job = Job(eog_after=eog_after, max_tokens=max_tokens, n_ctx=len(PROMPT) + room)
        tokens, reason, context, _ = plain(job)
        # where the target ended, the last token it drew is the end itself
        undecoded = 0 if reason == "eos" else 1
        assert context == [*PROMPT, *tokens][: len(PROMPT) + len(tokens) - undecoded]


@pytest.mark.parametrize("script", [None, *SCRIPTS])
def test_every_pattern_ends_as_plain_does(script: str | None) -> None:
    cycles = None if script is None else [script]
    for eog_after, max_tokens, room in product(
        (None, 0, 1, 2, 3, 5, 8), (None, 1, 2, 3, 4, 6, 9), (0, 1, 2, 3, 5, 8, 21)
    ):
        job = Job(eog_after=eog_after, max_tokens=max_tokens, n_ctx=len(PROMPT) + room)
        assert_same_as_plain(job, cycles)


@pytest.mark.parametrize("script", [None, *SCRIPTS])
def test_a_sampler_with_state_is_asked_as_often_and_as_in_plain(script: str | None) -> None:
    cycles = None if script is None else [script]
    for seed, eog_after, max_tokens in product((1, 2), (None, 0, 2, 5), (None, 1, 4, 9)):
        job = Job(seed=seed, eog_after=eog_after, max_tokens=max_tokens)
        assert_same_as_plain(job, cycles)


@pytest.mark.parametrize("draft_max", range(-1, 8))
def test_the_longest_draft_is_the_callers(draft_max: int) -> None:
    for script in FEW_SCRIPTS:
        assert_same_as_plain(Job(eog_after=9), [script], draft_max=draft_max)


@pytest.mark.parametrize("script", [None, *FEW_SCRIPTS])
def test_a_consumer_who_stops_leaves_plains_context(script: str | None) -> None:
    cycles = None if script is None else [script]
    for stop_after, eog_after, max_tokens, seed in product(
        range(12), (None, 3, 8), (None, 4, 8), (None, 3)
    ):
        job = Job(stop_after=stop_after, eog_after=eog_after, max_tokens=max_tokens, seed=seed)
        assert_same_as_plain(job, cycles)


def test_drafts_of_changing_length() -> None:
    for first, second in product(FEW_SCRIPTS, repeat=2):
        assert_same_as_plain(Job(eog_after=15, seed=1), [first, second, "rrw"])


@settings(max_examples=400, deadline=None)
@given(
    job=st.builds(
        lambda room, prompt, **other: Job(prompt=prompt, n_ctx=len(prompt) + room, **other),
        prompt=st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple),
        room=st.integers(0, 40),
        eog_after=st.none() | st.integers(0, 30),
        max_tokens=st.none() | st.integers(1, 40),
        n_vocab=st.integers(4, 40),
        seed=st.none() | st.integers(0, 99),
        stop_after=st.none() | st.integers(0, 20),
    ),
    script=st.none() | st.lists(st.text("rrrwe", max_size=9), min_size=1, max_size=6),
    draft_max=st.integers(0, 9),
)
def test_anything_at_all_is_as_in_plain(job: Job, script: list[str] | None, draft_max: int) -> None:
    assert_same_as_plain(job, script, draft_max=draft_max)


def test_accepted_tokens_carry_the_drafters_name() -> None:
    job = Job(max_tokens=8)
    model, sampler = job.model(), job.sampler()
    drafter = ScriptedDrafter(model, sampler, ["rrw", "w", "rr"])
    tokens = generate(model, PROMPT, sampler=sampler, drafter=drafter, max_tokens=8)
    names = [token.source for token in tokens]
    assert names == [
        "target",  # with the prompt
        *("scripted", "scripted", "target"),
        "target",
        *("scripted", "scripted", "target"),
    ]


def test_a_full_context_still_gives_a_token() -> None:
    model = FakeModel(n_ctx=len(PROMPT))
    stats = Stats()
    drafter = ScriptedDrafter(model, GreedySampler(), ["r"])
    tokens = list(generate(model, PROMPT, sampler=GreedySampler(), drafter=drafter, stats=stats))
    assert tokens == [Token(plain(Job()).tokens[0], TARGET)]
    assert (stats.stop_reason, model.tokens, drafter.calls) == ("context", list(PROMPT), [])


def test_one_token_needs_the_prompt_only() -> None:
    model, stats = FakeModel(), Stats()
    drafter = ScriptedDrafter(model, GreedySampler(), ["r"])
    options: dict[str, Any] = {"sampler": GreedySampler(), "drafter": drafter, "stats": stats}
    assert len(list(generate(model, PROMPT, max_tokens=1, **options))) == 1
    assert (stats.stop_reason, model.tokens, drafter.calls) == ("length", list(PROMPT), [])
    assert model.decodes == [(len(PROMPT), 1)]


def test_no_tokens_at_all_may_be_asked_for() -> None:
    model, stats = FakeModel(), Stats()
    assert not list(generate(model, PROMPT, sampler=GreedySampler(), max_tokens=0, stats=stats))
    assert stats.stop_reason == "length"


@pytest.mark.parametrize("n_nodes", range(1, 7))
def test_every_tree_and_every_accepted_path(n_nodes: int) -> None:
    """All shapes, right as far as any of their nodes: 2,500 generations, the same text."""
    for job in (Job(max_tokens=11), Job(max_tokens=11, seed=3)):
        expected = plain(job)
        for parents, right in (
            (parents, right) for parents in shapes(n_nodes) for right in range(-1, n_nodes)
        ):
            model, sampler = job.model(), job.sampler()
            drafter = TreeDrafter(model, sampler, parents, right)
            tokens = generate(model, PROMPT, sampler=sampler, drafter=drafter, max_tokens=11)
            assert [token.id for token in tokens] == expected.tokens
            assert (model.tokens, sampler.calls) == (expected.context, expected.calls)
            depth = 0
            while right >= 0:
                right, depth = parents[right], depth + 1
            assert drafter.accepted[0] == depth


# -- controls: each of these engines is broken, the same check must say so -------------------------

LONG = Job(n_ctx=64, max_tokens=30)


def draw_past_the_end(model: Any, sampler: Any, tree: Tree, node: int) -> int:
    token = choose(model, sampler, tree, node)
    if tree.child(node, token) is None and node + 1 < len(tree):
        choose(model, sampler, tree, node + 1)
    return token


def draw_the_bonus_twice(model: Any, sampler: Any, tree: Tree, node: int) -> int:
    token = choose(model, sampler, tree, node)
    return choose(model, sampler, tree, node) if tree.child(node, token) is None else token


class KeepsTooMuch(FakeModel):
    def keep(self, path: Sequence[int]) -> None:
        more = [path[-1] + 1] if path[-1] + 1 < len(self._nodes) else []
        super().keep([*path, *more])


class KeepsTooLittle(FakeModel):
    def keep(self, path: Sequence[int]) -> None:
        super().keep(path[:-1] if len(path) > 1 else path)


def shifted(by: int) -> type[FakeModel]:
    class Shifted(FakeModel):
        def rollback(self, n_past: int) -> None:
            super().rollback(n_past + by)

    return Shifted


class NeverRollsBack(FakeModel):
    def rollback(self, n_past: int) -> None:
        pass


def test_control_accepting_every_draft_token_changes_the_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_same_as_plain(LONG, ["rrw", "rr"])
    monkeypatch.setattr(engine, "choose", accept_drafts)
    assert ids_of(LONG, ["rrw", "rr"]) != plain(LONG).tokens
    with pytest.raises(AssertionError):
        assert_same_as_plain(LONG, ["rrw", "rr"])


@pytest.mark.parametrize("broken", [draw_past_the_end, draw_the_bonus_twice])
def test_control_a_sampler_asked_too_often_is_noticed(
    broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "choose", broken)
    assert ids_of(LONG, ["rwr"]) == plain(LONG).tokens  # a greedy sampler does not mind
    with pytest.raises(AssertionError):
        assert_same_as_plain(LONG, ["rwr"])
    seeded = replace(LONG, seed=1)
    assert ids_of(seeded, ["rwr"]) != plain(seeded).tokens


@pytest.mark.parametrize("kind", [KeepsTooMuch, KeepsTooLittle])
@pytest.mark.parametrize("script", ["rw", "rwr", "rrrrwr"])
def test_control_keeping_the_wrong_nodes_changes_the_text(
    kind: type[FakeModel], script: str
) -> None:
    assert_same_as_plain(LONG, [script])
    assert ids_of(LONG, [script], kind) != plain(LONG).tokens
    with pytest.raises(AssertionError):
        assert_same_as_plain(LONG, [script], kind=kind)


def test_control_a_broken_last_rollback_is_noticed() -> None:
    job = replace(LONG, stop_after=3)
    assert_same_as_plain(job, ["rrrr"])
    with pytest.raises(AssertionError):
        assert_same_as_plain(job, ["rrrr"], kind=shifted(-1))
    for kind in (shifted(1), NeverRollsBack):  # a drafter that fails leaves tokens
        model, sampler = LONG.model(kind), LONG.sampler()
        drafter = ScriptedDrafter(model, sampler, ["rr"], fail_at=2)
        with pytest.raises(AssertionError):
            run_until_failure(model, sampler, drafter, DrafterError, job=LONG)


# -- failures --------------------------------------------------------------------------------------


def run_until_failure(
    model: FakeModel,
    sampler: GreedySampler,
    drafter: ScriptedDrafter | None,
    failure: type[BaseException],
    *,
    job: Job,
    throw_after: int | None = None,
) -> list[int]:
    """The tokens a consumer saw before the failure; checks what is left and that it goes on."""
    expected, stats = plain(job).tokens, Stats()
    tokens: list[int] = []
    generator = generate(
        model,
        job.prompt,
        sampler=sampler,
        drafter=drafter,
        max_tokens=job.max_tokens,
        stats=stats,
    )

    def consume() -> None:
        for token in generator:
            tokens.append(token.id)
            if len(tokens) == throw_after:
                generator.throw(failure())

    with pytest.raises(failure):
        consume()
    assert tokens == expected[: len(tokens)]
    assert (stats.stop_reason, stats.predicted_n) == ("stopped", len(tokens))
    assert next(generator, None) is None
    if model.n_decodes == model.fail_at == 1:
        assert model.tokens == []
        return tokens
    assert model.tokens == [*job.prompt, *tokens[:-1]]
    assert_goes_on(model, job, tokens)
    return tokens


def assert_goes_on(model: FakeModel, job: Job, tokens: list[int]) -> None:
    """Asked again with what was generated so far, the text is as if nothing had happened."""
    model.fail_at = None
    stats = Stats()
    prompt = [*job.prompt, *tokens]
    left = None if job.max_tokens is None else job.max_tokens - len(tokens)
    rest = generate(model, prompt, sampler=GreedySampler(), max_tokens=left, stats=stats)
    assert [*tokens, *(token.id for token in rest)] == plain(job).tokens
    assert stats.prompt_n == min(len(tokens), 1)  # the logits after the prompt are there already


@pytest.mark.parametrize("script", FEW_SCRIPTS)
def test_a_failed_decode_leaves_what_was_yielded(script: str) -> None:
    for fail_at in range(1, 6):
        model, sampler = LONG.model(fail_at=fail_at), LONG.sampler()
        drafter = ScriptedDrafter(model, sampler, [script])
        run_until_failure(model, sampler, drafter, DecodeError, job=LONG)


@pytest.mark.parametrize("script", FEW_SCRIPTS)
def test_a_failed_drafter_leaves_what_was_yielded(script: str) -> None:
    for fail_at in range(1, 5):
        model, sampler = LONG.model(), LONG.sampler()
        drafter = ScriptedDrafter(model, sampler, [script], fail_at=fail_at)
        run_until_failure(model, sampler, drafter, DrafterError, job=LONG)


@pytest.mark.parametrize("script", FEW_SCRIPTS)
def test_a_failed_sampler_leaves_what_was_yielded(script: str) -> None:
    for fail_at in range(1, 12):
        model, sampler = LONG.model(), LONG.sampler(fail_at=fail_at)
        drafter = ScriptedDrafter(model, sampler, [script])
        tokens = run_until_failure(model, sampler, drafter, SamplerError, job=LONG)
        assert len(tokens) < fail_at


@pytest.mark.parametrize("script", FEW_SCRIPTS)
def test_an_exception_thrown_in_leaves_what_was_yielded(script: str) -> None:
    for failure, throw_after in product((KeyboardInterrupt, ValueError), range(1, 12)):
        model, sampler = LONG.model(), LONG.sampler()
        drafter = ScriptedDrafter(model, sampler, [script])
        run_until_failure(model, sampler, drafter, failure, job=LONG, throw_after=throw_after)


def test_an_error_is_not_hidden_by_a_model_that_takes_nothing_back() -> None:
    model = LONG.model(rollback_refusal="it is recurrent")
    with pytest.raises(SamplerError):
        list(generate(model, PROMPT, sampler=GreedySampler(fail_at=3)))


# -- prompts and what the context holds already ----------------------------------------------------


def test_a_prompt_that_shares_a_beginning_decodes_the_rest_only() -> None:
    held = [*PROMPT, *plain(LONG).context[len(PROMPT) : 9]]
    for common, extra, again in product(range(len(held) + 1), range(4), (False, True)):
        other = [31 if held[common : common + 1] != [31] else 30] * extra
        # what agrees again behind a difference must not count
        prompt = held[:common] + other + (held[common + extra :] if extra and again else [])
        if not prompt:
            continue
        job = Job(prompt=tuple(prompt))
        reused = min(common, len(prompt) - 1)  # the last token is decoded for its logits
        for refusal in (None, "it is recurrent"):
            model, stats = job.model(rollback_refusal=refusal), Stats()
            model.decode(held, n_outputs=1)
            tokens = [t.id for t in generate(model, prompt, sampler=job.sampler(), stats=stats)]
            assert tokens == plain(job).tokens
            assert model.tokens == plain(job).context
            if prompt == held:  # the logits after it are there already
                assert (stats.prompt_n, model.n_clears) == (0, 0)
                continue
            kept = 0 if refusal and reused < len(held) else reused
            assert stats.prompt_n == model.decodes[1][0] == len(prompt) - kept
            assert model.decodes[1][1] == 1
            assert model.n_clears == (kept == 0)


@pytest.mark.parametrize("script", FEW_SCRIPTS)
def test_a_second_turn_keeps_the_first(script: str) -> None:
    model = FakeModel(n_ctx=100)
    first = [t.id for t in generate(model, PROMPT, sampler=GreedySampler(), max_tokens=10)]
    held = list(model.tokens)
    prompt = (*PROMPT, *first, 9, 9)
    job, sampler, stats = Job(prompt=prompt, n_ctx=100), GreedySampler(), Stats()
    drafter = ScriptedDrafter(model, sampler, [script])
    second = generate(model, prompt, sampler=sampler, drafter=drafter, stats=stats)
    assert [t.id for t in second] == plain(job).tokens
    assert stats.prompt_n == len(prompt) - len(held) == 3
    assert model.n_clears == 1


def test_a_failed_prefill_keeps_what_was_shared() -> None:
    model, stats = FakeModel(fail_at=2), Stats()
    model.decode([5, 6, 7, 8], n_outputs=1)
    with pytest.raises(DecodeError):
        list(generate(model, [5, 6, 9], sampler=GreedySampler(), stats=stats))
    assert (model.tokens, stats.stop_reason, stats.predicted_n) == ([5, 6], "stopped", 0)


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ([], ValueError, "empty prompt"),
        ([5] * 9, ContextFullError, "9 tokens, the context 8; use a larger --ctx-size"),
    ],
)
def test_an_impossible_prompt_decodes_nothing(
    prompt: list[int], error: type[Exception], words: str
) -> None:
    model = FakeModel(n_ctx=8)
    model.decode([5, 6], n_outputs=1)
    with pytest.raises(error, match=words) as caught:
        list(generate(model, prompt, sampler=GreedySampler()))
    assert "\n" not in str(caught.value)
    assert (model.tokens, model.n_decodes) == ([5, 6], 1)


def test_a_prompt_whose_logits_are_there_is_not_decoded_again() -> None:
    model, stats = FakeModel(), Stats()
    model.decode(PROMPT[:1])
    model.decode(PROMPT[1:], n_outputs=2)
    tokens = generate(model, PROMPT, sampler=GreedySampler(), max_tokens=9, stats=stats)
    assert [token.id for token in tokens] == plain(Job(max_tokens=9)).tokens
    assert (stats.prompt_n, stats.cycles, len(model.decodes)) == (0, 8, 10)


def test_nothing_happens_before_the_first_token_is_asked_for() -> None:
    model = FakeModel()
    generate(model, PROMPT, sampler=GreedySampler())
    assert model.n_decodes == model.n_clears == 0


def test_a_model_that_takes_nothing_back_decodes_plainly() -> None:
    for eog_after, max_tokens in product((None, 0, 1, 5), (None, 1, 4)):
        job = Job(eog_after=eog_after, max_tokens=max_tokens)
        model, stats = job.model(rollback_refusal="it is recurrent"), Stats()
        tokens = generate(model, PROMPT, sampler=job.sampler(), max_tokens=max_tokens, stats=stats)
        assert [t.id for t in tokens] == plain(job).tokens
        assert (model.tokens, stats.stop_reason) == (plain(job).context, plain(job).stop_reason)


def test_drafting_for_a_model_that_takes_nothing_back_is_refused() -> None:
    model = LONG.model(rollback_refusal="it is recurrent")
    drafter = ScriptedDrafter(model, GreedySampler(), ["w"])
    with pytest.raises(UnsupportedModelError, match="recurrent"):
        list(generate(model, PROMPT, sampler=GreedySampler(), drafter=drafter))


# -- statistics ------------------------------------------------------------------------------------


def test_statistics_of_a_known_run() -> None:
    job, stats = Job(max_tokens=9), Stats()
    model, sampler = job.model(), job.sampler()
    drafter = ScriptedDrafter(model, sampler, ["rrw", "w", "", "rr"])
    list(generate(model, PROMPT, sampler=sampler, drafter=drafter, max_tokens=9, stats=stats))
    assert (stats.prompt_n, stats.predicted_n, stats.cycles) == (3, 9, 4)
    assert (stats.drafted, stats.accepted) == (6, 4)
    assert stats.sources["scripted"].accepted_lengths == {0: 1, 2: 2}  # an empty draft is none
    assert stats.mean_acceptance_length == 2.0
    assert stats.acceptance_rate == 4 / 6
    parts = (stats.draft_s, stats.verify_s, stats.sample_s)
    assert all(part > 0 for part in parts)
    assert stats.prompt_s > 0
    assert sum(parts) <= stats.cycle_s


class ReadsThePrompt(ScriptedDrafter):
    """Its first draft waits for a draft model that decodes the prompt."""

    READING_S = 0.3

    def draft(self, pending: int, *, n_max: int) -> Tree:
        self.prompt_s = 0.0 if self.calls else self.READING_S
        sleep(self.prompt_s)
        return super().draft(pending, n_max=n_max)


def test_what_a_drafter_takes_to_read_the_prompt_is_prompt_time() -> None:
    job, stats = Job(max_tokens=9), Stats()
    model, sampler = job.model(), job.sampler()
    drafter = ReadsThePrompt(model, sampler, ["rrw", "w", "", "rr"])
    list(generate(model, PROMPT, sampler=sampler, drafter=drafter, max_tokens=9, stats=stats))
    assert drafter.READING_S < stats.prompt_s < 2 * drafter.READING_S  # once, not every cycle
    assert 0 < stats.draft_s < drafter.READING_S
    assert 0 < stats.draft_s + stats.verify_s + stats.sample_s <= stats.cycle_s < drafter.READING_S


def test_plain_runs_have_no_source() -> None:
    stats = Stats()
    list(generate(LONG.model(), PROMPT, sampler=GreedySampler(), stats=stats))
    assert (stats.sources, stats.mean_acceptance_length) == ({}, 1.0)
    assert stats.cycles == stats.predicted_n - 1


# The scripts above are only worth something if they are what they say.
def test_scripts_cover_every_draft_length_and_no_pattern_twice() -> None:
    assert {len(script) for script in SCRIPTS} == set(range(7))
    assert len(set(SCRIPTS)) == len(SCRIPTS)
    assert set(chain.from_iterable(SCRIPTS)) == set("rwe")
