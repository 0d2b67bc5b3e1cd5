"""Statistics: their identities, and the two JSON objects made of them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_gguf.drafting.tree import ROOT, Offer, Tree
from swift_gguf.stats import SourceStats, Stats

SECONDS = st.floats(0, 1e6)
# of each draft: its length, and how much of it was accepted
DRAFTS = st.lists(st.integers(0, 25).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))


def source(drafts: list[tuple[int, int]]) -> SourceStats:
    stats = SourceStats()
    for drafted, accepted in drafts:
        stats.count(drafted=drafted, accepted=accepted)
    return stats


@settings(deadline=None)
@given(DRAFTS)
def test_a_source_adds_up(drafts: list[tuple[int, int]]) -> None:
    values = source(drafts).as_dict()
    histogram = values["accepted_length_histogram"]
    assert values["drafts"] == len(drafts) == sum(histogram)
    assert values["drafted"] == sum(drafted for drafted, _ in drafts)
    assert values["accepted"] == sum(accepted for _, accepted in drafts)
    assert values["accepted"] == sum(n * count for n, count in enumerate(histogram))
    assert values["accepted"] <= values["drafted"]
    assert len(histogram) == max((accepted for _, accepted in drafts), default=-1) + 1


def test_a_histogram_has_no_holes() -> None:
    histogram = source([(4, 3), (4, 0), (4, 3)]).as_dict()["accepted_length_histogram"]
    assert histogram == [1, 0, 0, 2]


def test_looking_at_a_source_does_not_change_it() -> None:
    stats = source([(4, 3)])
    assert stats.as_dict() == stats.as_dict()
    assert stats.accepted_lengths == {3: 1}


def test_a_draft_counts_for_the_sources_that_offered_its_tokens() -> None:
    tree = Tree()
    for token, (parent, name) in enumerate([(ROOT, "one"), (ROOT, "two"), (0, "two"), (2, "one")]):
        tree.add(parent, Offer(token, 0.5, name), 0.5)
    stats = Stats()
    stats.count(tree, [0, 2])
    stats.count(tree.cut(1), [])
    stats.count(Tree(), [])  # no draft at all
    one, two = stats.sources["one"], stats.sources["two"]
    assert (one.drafts, one.drafted, one.accepted) == (2, 3, 1)
    assert (two.drafts, two.drafted, two.accepted) == (1, 2, 1)
    assert (one.accepted_lengths, two.accepted_lengths) == ({1: 1, 0: 1}, {1: 1})
    assert (stats.drafted, stats.accepted) == (5, 2)


@settings(deadline=None)
@given(first=DRAFTS, second=DRAFTS, seconds=st.lists(SECONDS, min_size=5, max_size=5))
def test_a_generation_adds_up(
    first: list[tuple[int, int]], second: list[tuple[int, int]], seconds: list[float]
) -> None:
    draft_s, verify_s, sample_s, search_s, other_s = seconds
    stats = Stats(
        cycles=len(first) + len(second),
        draft_s=draft_s,
        verify_s=verify_s,
        sample_s=sample_s,
        search_s=search_s,
        cycle_s=sum(seconds),
        sources={"one": source(first), "two": source(second)},
    )
    stats.cycle_n = stats.cycles + stats.accepted
    stats.predicted_n = 1 + stats.cycle_n
    both = first + second
    assert stats.drafted == sum(drafted for drafted, _ in both)
    assert stats.accepted == sum(accepted for _, accepted in both)
    assert 0 <= stats.acceptance_rate <= 1
    assert stats.acceptance_rate * stats.drafted == pytest.approx(stats.accepted)
    assert stats.mean_acceptance_length >= 1
    if both:
        mean = sum(1 + accepted for _, accepted in both) / len(both)
        assert stats.mean_acceptance_length == pytest.approx(mean)
    assert stats.overhead_s == pytest.approx(other_s, abs=1e-6)
    split = stats.speculation()["seconds"]
    assert sum(split.values()) == pytest.approx(stats.cycle_s)
    assert list(split) == ["draft", "verify", "search", "other"]
    if stats.cycle_s > 1e-3:
        assert stats.tokens_per_second * stats.cycle_s == pytest.approx(stats.predicted_n - 1)


def test_nothing_divides_by_zero() -> None:
    stats = Stats()
    assert stats.acceptance_rate == 0.0
    assert stats.mean_acceptance_length == 1.0
    assert stats.tokens_per_second == 0.0
    assert stats.overhead_s == 0.0
    assert SourceStats().as_dict()["accepted_length_histogram"] == []
    for numbers in (stats.timings().values(), stats.speculation()["seconds"].values()):
        assert set(numbers) == {0}


def test_rounding_makes_no_negative_time() -> None:
    assert Stats(cycle_s=1.0, draft_s=0.7, verify_s=0.3, sample_s=1e-9).overhead_s == 0.0


def test_a_first_token_alone_has_no_speed() -> None:
    stats = Stats(predicted_n=1, prompt_s=0.5)
    assert stats.tokens_per_second == 0.0


def test_timings_have_llama_servers_names() -> None:
    stats = Stats(prompt_n=10, prompt_s=0.5, predicted_n=9, cycles=4, cycle_s=2.0)
    stats.sources["one"] = source([(3, 2), (1, 0), (2, 2), (0, 0)])
    assert stats.timings() == {
        "prompt_n": 10,
        "prompt_ms": 500.0,
        "predicted_n": 9,
        "predicted_ms": 2000.0,
        "predicted_per_second": 4.0,
        "draft_n": 6,
        "draft_n_accepted": 4,
    }


@pytest.mark.parametrize("drafts", [[], [(3, 2), (3, 0), (0, 0)]])
def test_both_objects_are_json(drafts: list[tuple[int, int]]) -> None:
    stats = Stats(prompt_n=3, predicted_n=6, cycles=3, cycle_s=0.1)
    stats.sources["one"] = source(drafts)
    for values in (stats.timings(), stats.speculation()):
        assert json.loads(json.dumps(values, allow_nan=False)) == values
        assert all(math.isfinite(number) for number in numbers_in(values))
    assert stats.speculation()["sources"] == {"one": source(drafts).as_dict()}


def numbers_in(values: Any) -> list[float]:
    if isinstance(values, dict):
        return [number for value in values.values() for number in numbers_in(value)]
    if isinstance(values, list):
        return [number for value in values for number in numbers_in(value)]
    return [values]


def test_two_generations_share_nothing() -> None:
    one, two = Stats(), Stats()
    one.sources["one"] = SourceStats()
    one.sources["one"].count(drafted=1, accepted=1)
    assert two.sources == {}
    assert SourceStats().accepted_lengths == {}
