"""The n-gram lookup against a naive search, and the work its index takes."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift_gguf.drafting import ngram
from swift_gguf.drafting.ngram import REFRESHED, NGram
from swift_gguf.drafting.tree import Offer

ALL = 99


def texts(max_size: int = 40) -> st.SearchStrategy[list[int]]:
    """Of few symbols, so that much is repeated, and of whole repetitions."""
    symbols = st.integers(2, 4).flatmap(
        lambda n: st.lists(st.integers(0, n - 1), max_size=max_size)
    )
    repetitions = st.builds(
        lambda unit, times, rest: unit * times + rest,
        st.lists(st.integers(0, 2), min_size=1, max_size=4),
        st.integers(1, max_size // 4),
        st.lists(st.integers(0, 3), max_size=4),
    )
    return symbols | repetitions


def lookup(text: Sequence[int], **options: int) -> NGram:
    source = NGram(**options)
    source.follow(text)
    return source


def naive(text: list[int], path: list[int]) -> tuple[int, list[int]]:
    """Length of the longest end of text + path that occurs in the text with something after it,
    and what is after its occurrences, the latest first."""
    whole = text + path
    for length in range(min(len(whole), len(text) - 1), 0, -1):
        end = whole[-length:]
        places = [i for i in range(length, len(text)) if text[i - length : i] == end]
        if places:
            return length, list(dict.fromkeys(text[i] for i in reversed(places)))
    return 0, []


def shape(length: int, n: int) -> list[float]:
    """Confidences of n offers after a match."""
    rest = [0.5**i / (length + 1) for i in range(1, n)]
    return [length / (length + 1), *rest][:n]


# -- what is offered -------------------------------------------------------------------------------


@given(texts(), st.lists(st.integers(0, 3), max_size=6))
def test_the_longest_match_and_all_that_follows_it(text: list[int], path: list[int]) -> None:
    offers = lookup(text, n_offers=ALL).offers(path)
    length, follow = naive(text, path)
    assert sorted(offer.token for offer in offers) == sorted(follow)
    assert [offer.probability for offer in offers] == pytest.approx(shape(length, len(follow)))


@given(texts(), st.data())
def test_paths_that_the_lookup_itself_drafts(text: list[int], data: st.DataObject) -> None:
    source = lookup(text, n_offers=ALL)
    path: list[int] = []
    for _ in range(12):
        offers = source.offers(path)
        length, follow = naive(text, path)
        assert {offer.token for offer in offers} == set(follow)
        assert not offers or offers[0].probability == pytest.approx(length / (length + 1))
        if not offers:
            break
        path.append(data.draw(st.sampled_from(offers)).token)


@given(texts(max_size=REFRESHED + 1), st.lists(st.integers(0, 3), max_size=3))
def test_the_latest_comes_first(text: list[int], path: list[int]) -> None:
    text = text[: REFRESHED + 1]  # no token then follows more states than are refreshed
    assert [offer.token for offer in lookup(text, n_offers=ALL).offers(path)] == naive(text, path)[
        1
    ]


def test_the_latest_comes_first_in_a_longer_text() -> None:
    draw = random.Random(1)
    text = [draw.randrange(5) for _ in range(150)]
    source = lookup(text, n_offers=ALL)
    for path in ([a, b] for a in range(5) for b in range(5)):
        assert [offer.token for offer in source.offers(path)] == naive(text, path)[1]


@given(texts(), st.integers(1, 4), st.integers(1, 6))
def test_limits(text: list[int], n_offers: int, min_match: int) -> None:
    length, _ = naive(text, [])
    everything = lookup(text, n_offers=ALL).offers([])
    expected = everything[:n_offers] if length >= min_match else []
    assert lookup(text, n_offers=n_offers, min_match=min_match).offers([]) == expected


@given(texts())
def test_offers_are_probabilities_the_likeliest_first(text: list[int]) -> None:
    values = [offer.probability for offer in lookup(text, n_offers=ALL).offers([])]
    assert values == sorted(values, reverse=True)
    assert sum(values) <= 1.0
    assert all(value > 0 for value in values)


def test_a_repetition_goes_on_and_on() -> None:
    source = lookup([7, 1, 2, 1, 2, 1, 2])
    path: list[int] = []
    for _ in range(50):
        path.append(source.offers(path)[0].token)
    assert path == [1, 2] * 25


def test_confidence_grows_along_a_match() -> None:
    source = lookup([1, 2, 3, 4, 9, 1])
    drafts = [source.offers(path) for path in ([], [2], [2, 3], [2, 3, 4])]
    assert drafts == [[Offer(2, 1 / 2)], [Offer(3, 2 / 3)], [Offer(4, 3 / 4)], [Offer(9, 4 / 5)]]


def test_other_continuations_share_what_is_left() -> None:
    assert lookup([1, 2, 1, 3, 1, 4, 1]).offers([]) == [
        Offer(4, 1 / 2),
        Offer(3, 1 / 4),
        Offer(2, 1 / 8),
    ]


@pytest.mark.parametrize("text", [[], [1], [1, 2, 3]])
def test_nothing_is_known_of_a_text_without_repetition(text: list[int]) -> None:
    assert lookup(text).offers([]) == []
    assert lookup(text).offers([5, 6]) == []
    assert NGram().offers([]) == []


@pytest.mark.parametrize("options", [{"n_offers": 0}, {"min_match": 0}])
def test_senseless_limits(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        NGram(**options)


# -- texts that grow and change --------------------------------------------------------------------


def everything(source: NGram) -> list[Any]:
    paths: list[list[int]] = [[], *([a] for a in range(4)), *([a, 1] for a in range(4))]
    return [source.offers(path) for path in paths]


@given(st.lists(texts(max_size=12), max_size=6))
def test_growing_step_by_step_is_growing_at_once(parts: list[list[int]]) -> None:
    source = NGram(n_offers=ALL)
    text: list[int] = []
    for part in parts:
        text = text + part
        source.follow(text)
        assert everything(source) == everything(lookup(text, n_offers=ALL))


@given(texts(), texts(), st.integers(0, 40))
def test_a_changed_text_is_another_text(old: list[int], new: list[int], kept: int) -> None:
    source = lookup(old, n_offers=ALL)
    source.offers([1, 1])
    text = old[:kept] + new
    source.follow(text)
    assert everything(source) == everything(lookup(text, n_offers=ALL))


@pytest.mark.parametrize("at", [0, 1, ngram.SLICE - 1, ngram.SLICE, ngram.SLICE + 5, -1])
def test_a_change_is_seen_wherever_it_is(at: int) -> None:
    old = list(range(ngram.SLICE + 100))
    new = [*old, 0, 1]
    new[at if at >= 0 else len(old) - 1] = 100_000
    source = lookup(old)
    source.follow([*new, 100_000])
    assert source.offers([]) == lookup([*new, 100_000]).offers([]) != []


def test_the_caller_s_list_stays_the_caller_s() -> None:
    text = [1, 2, 1]
    source = lookup(text)
    text.append(3)
    assert source.offers([]) == [Offer(2, 1 / 2)]
    source.follow(text)
    assert source.offers([1]) == [Offer(3, 1 / 2), Offer(2, 1 / 4)]
    assert text == [1, 2, 1, 3]


def test_any_sequence_will_do() -> None:
    source = lookup((1, 2, 1))
    source.follow((1, 2, 1, 2))
    assert source.offers((1,)) == lookup([1, 2, 1, 2]).offers([1]) == [Offer(2, 3 / 4)]


def test_looking_up_changes_nothing() -> None:
    source = lookup([1, 2, 1, 3, 1], n_offers=ALL)
    before = everything(source)
    source.offers([1, 2, 3, 1, 2, 3])
    assert everything(source) == before
    source.follow([1, 2, 1, 3, 1])
    assert everything(source) == before


def test_an_interrupted_index_is_thrown_away() -> None:
    source = lookup([1, 2, 1])
    broken: Any = [1, 2, 1, 2, [], 1]
    with pytest.raises(TypeError):
        source.follow(broken)
    assert source.offers([]) == source.offers([1]) == []
    source.follow([1, 2, 1, 2])
    assert everything(source) == everything(lookup([1, 2, 1, 2]))


# -- work ------------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the lines of ngram.py that run: every step of the automaton is one or more."""
    lines = [0]

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if frame.f_code.co_filename != ngram.__file__:
            return None
        lines[0] += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def alike(n: int) -> list[int]:
    return [0] * n


def two_symbols(n: int) -> list[int]:
    draw = random.Random(n)
    return [draw.randrange(2) for _ in range(n)]


def many_symbols(n: int) -> list[int]:
    draw = random.Random(n)
    return [draw.randrange(50) for _ in range(n)]


def costly(n: int) -> list[int]:
    """a...ab...b: the most states a text can have."""
    return [0] * (n // 2) + [1] * (n // 2)


@pytest.mark.parametrize("kind", [alike, two_symbols, many_symbols, costly])
def test_work_is_linear(kind: Callable[[int], list[int]]) -> None:
    work = []
    for n in (300, 1200):
        text = kind(n)
        with counted() as lines:
            lookup(text)
        work.append(lines[0])
    assert work[1] < 4.6 * work[0]
    assert work[1] < 100 * 1200


@pytest.mark.parametrize("kind", [alike, two_symbols, many_symbols, costly])
def test_growing_takes_no_more_work_for_a_longer_text(kind: Callable[[int], list[int]]) -> None:
    text = kind(1200)
    step = 6
    with counted() as at_once:
        lookup(text)
    with counted() as grown:
        source = NGram()
        for end in range(step, len(text) + 1, step):
            source.follow(text[:end])
    assert grown[0] - at_once[0] < 25 * len(text) / step  # a constant for each call


def test_a_path_is_walked_once() -> None:
    source = lookup(two_symbols(1200))
    path: list[int] = []
    with counted() as lines:
        for _ in range(100):
            path.append(source.offers(path)[0].token)
    assert lines[0] < 100 * 100
    with counted() as again:
        source.offers(path[:-1])
    assert again[0] < 40
