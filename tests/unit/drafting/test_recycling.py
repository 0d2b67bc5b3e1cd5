"""The table of recycled tokens: what it offers, forgets, exports and refuses."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift_gguf.drafting.recycling import Recycling
from swift_gguf.drafting.tree import Offer

N_VOCAB = 16
TOKEN = st.integers(0, N_VOCAB - 1)


@st.composite
def lessons(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Arguments of calls of `learn`."""
    calls = []
    for _ in range(draw(st.integers(0, 12))):
        successors = draw(st.lists(TOKEN, unique=True, max_size=5))
        probability = st.floats(0, 1)
        probabilities = [draw(probability) for _ in successors]
        calls.append(
            {
                "token": draw(TOKEN),
                "successors": successors,
                "probabilities": sorted(probabilities, reverse=True),
                "previous": draw(st.none() | TOKEN),
            }
        )
    return calls


def taught(calls: list[dict[str, Any]], **options: int) -> Recycling:
    table = Recycling(**options)
    for call in calls:
        table.learn(**call)
    return table


def row(table: Recycling, *context: int) -> list[int]:
    table.follow(context)
    return [offer.token for offer in table.offers([])]


# -- offers ----------------------------------------------------------------------------------------


def test_the_target_s_own_probabilities_come_back() -> None:
    table = Recycling()
    table.learn(5, [7, 8], [0.6, 0.3])
    table.follow([1, 5])
    assert table.offers([]) == (Offer(7, 0.3), Offer(8, 0.15)), "half: the token before may matter"
    assert table.offers([9]) == ()
    table.learn(5, [7, 8], [0.6, 0.3], previous=1)
    assert table.offers([]) == (Offer(7, 0.6), Offer(8, 0.3))


def test_what_was_seen_last_counts() -> None:
    table = Recycling()
    table.learn(5, [7], [0.6])
    table.learn(5, [8], [0.5])
    assert row(table, 5) == [8]


def test_two_tokens_know_better_than_one() -> None:
    table = Recycling()
    table.learn(5, [7], [0.6], previous=1)
    table.learn(5, [8], [0.5], previous=2)
    assert row(table, 1, 5) == [7]
    assert row(table, 2, 5) == [8]
    assert row(table, 3, 5) == [8]  # the latest after any token
    assert row(table, 5) == [8]
    assert row(table, 5, 1) == []


@given(st.lists(TOKEN, max_size=4), st.lists(TOKEN, max_size=4))
def test_a_path_counts_as_if_it_were_in_the_text(text: list[int], path: list[int]) -> None:
    table = Recycling()
    for token in range(N_VOCAB):
        table.learn(token, [token], [1.0])
        table.learn(token, [0, token], [0.5, 0.5], previous=0)
    table.follow(text)
    offers = table.offers(path)
    assert list(offers) == [Offer(t, p) for t, p in expected(text + path)]


def expected(text: list[int]) -> list[tuple[int, float]]:
    """Every token was last learned after token 0; that row is the one of the token alone, too."""
    p = 0.5 if text[-2:-1] == [0] else 0.25
    return [(0, p), (text[-1], p)] if text else []


def test_only_the_likeliest_are_kept() -> None:
    table = Recycling(n_offers=2)
    table.learn(5, [7, 8, 9], [0.6, 0.3, 0.1])
    assert row(table, 5) == [7, 8]


def test_nothing_learned_nothing_offered() -> None:
    table = Recycling()
    assert table.offers([]) == table.offers([3]) == ()
    table.learn(3, [4], [0.9])
    table.learn(3, [], [], previous=1)  # no reason to forget
    assert row(table, 1, 3) == [4]
    assert len(table) == 1


def test_every_successor_needs_a_probability() -> None:
    with pytest.raises(ValueError):
        Recycling().learn(5, [7, 8], [0.6])


@pytest.mark.parametrize("options", [{"n_offers": 0}, {"max_rows": 0}])
def test_senseless_limits(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Recycling(**options)


# -- memory ----------------------------------------------------------------------------------------


def test_the_least_recently_learned_is_dropped() -> None:
    table = Recycling(max_rows=2)
    table.learn(1, [7], [0.6])
    table.learn(2, [8], [0.6])
    table.learn(1, [9], [0.6])
    table.follow([2])
    table.offers([])  # to be looked up is not to be learned
    table.learn(3, [7], [0.6])
    assert [row(table, token) for token in (1, 2, 3)] == [[9], [], [7]]


@given(lessons(), st.integers(1, 8))
def test_memory_is_bounded_and_holds_the_latest(calls: list[dict[str, Any]], n: int) -> None:
    small, large = taught(calls, max_rows=n).to_rows(), taught(calls).to_rows()
    assert small == large[-n:]


# -- export ----------------------------------------------------------------------------------------


@given(lessons())
def test_what_is_exported_can_be_loaded(calls: list[dict[str, Any]]) -> None:
    table = taught(calls)
    rows = json.loads(json.dumps(table.to_rows(), allow_nan=False))
    loaded = Recycling.from_rows(rows, n_vocab=N_VOCAB)
    assert loaded.to_rows() == table.to_rows()
    for context in ([], *([a] for a in range(N_VOCAB)), *([a, 3] for a in range(N_VOCAB))):
        assert row(loaded, *context) == row(table, *context)


def test_rows_are_compact() -> None:
    table = Recycling()
    table.learn(5, [7, 8], [0.66666, 0.0001], previous=4)
    assert table.to_rows() == [[[5], [7, 8], [0.667, 0.0]], [[4, 5], [7, 8], [0.667, 0.0]]]


def test_numpy_s_numbers_become_plain_ones() -> None:
    table = Recycling()
    successors, probabilities = np.array([7, 8]), np.array([0.75, 0.125], np.float32)
    table.learn(np.int32(5), successors, probabilities, previous=np.int64(4))  # type: ignore
    assert json.loads(json.dumps(table.to_rows())) == table.to_rows()


@given(lessons(), st.integers(1, 8))
def test_a_smaller_table_takes_the_latest(calls: list[dict[str, Any]], n: int) -> None:
    rows = taught(calls).to_rows()
    loaded = Recycling.from_rows(rows, n_vocab=N_VOCAB, max_rows=n, n_offers=2).to_rows()
    assert loaded == [[context, ids[:2], p[:2]] for context, ids, p in rows[-n:]]


def test_a_loaded_table_goes_on_learning() -> None:
    rows = [[[5], [7], [0.5]], [[6], [7], [0.5]]]
    table = Recycling.from_rows(rows, n_vocab=N_VOCAB, n_offers=1, max_rows=2)
    table.learn(8, [9, 10], [0.75, 0.25])
    assert [row(table, token) for token in (5, 6, 8)] == [[], [7], [9]]


SOUND: list[Any] = [[1, 2], [3, 4], [0.5, 0.25]]


def test_the_sound_row_of_the_next_test_is_sound() -> None:
    assert Recycling.from_rows([SOUND], n_vocab=N_VOCAB).to_rows() == [SOUND]


@pytest.mark.parametrize(
    "rows",
    [
        None,
        {"rows": []},
        "rows",
        ((SOUND),),
        [None],
        [[]],
        [SOUND[:2]],
        [[*SOUND, 1]],
        [SOUND, SOUND],
        *(
            [[context, *SOUND[1:]]]
            for context in ([], [1, 2, 3], 1, "12", [1, -1], [N_VOCAB], [1.0], [True], [None])
        ),
        *(
            [[SOUND[0], successors, SOUND[2]]]
            for successors in ([], [3], [3, 3], [3, N_VOCAB], [3, -1], [3, 4.0], [3, "4"], [[3], 4])
        ),
        *(
            [[*SOUND[:2], probabilities]]
            for probabilities in (
                [],
                [0.5],
                [0.25, 0.5],
                [1.5, 0.5],
                [0.5, -0.1],
                [0.5, float("nan")],
                [float("inf"), 0.5],
                [True, 0.5],
                [0.5, None],
                ["0.5", "0.25"],
                [10**400, 0.5],
            )
        ),
        [[SOUND[0], [], []]],
    ],
    ids=repr,
)
def test_damage_is_refused(rows: object) -> None:
    with pytest.raises(ValueError):
        Recycling.from_rows(rows, n_vocab=N_VOCAB)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 20) | st.floats() | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=1), inner),
    max_leaves=4,
)


@given(st.lists(JUNK | st.lists(st.lists(JUNK, max_size=3), min_size=3, max_size=3), max_size=3))
def test_anything_is_loaded_or_refused(rows: list[Any]) -> None:
    try:
        table = Recycling.from_rows(rows, n_vocab=N_VOCAB)
    except ValueError:
        return
    assert len(table) == len(rows)
