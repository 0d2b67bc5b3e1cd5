"""The acceptance rule, against its formula."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_gguf.verification import verify

EOG = 0


class Rows:
    """A sampler with one answer a row, that minds being asked out of turn."""

    def __init__(self, answers: Sequence[int]) -> None:
        self.answers = answers
        self.asked = 0

    def __call__(self, row: int) -> int:
        assert row == self.asked, "rows must be drawn in order, each once"
        self.asked += 1
        return self.answers[row]


def by_formula(draft: Sequence[int], answers: Sequence[int]) -> list[int]:
    """Of all lengths the longest that is an accepted prefix, and the token after it."""
    accepted = max(
        n
        for n in range(len(draft) + 1)
        if list(draft[:n]) == list(answers[:n]) and EOG not in answers[:n]
    )
    return list(answers[: accepted + 1])


def check(draft: Sequence[int], answers: Sequence[int]) -> None:
    sample = Rows(answers)
    emitted = verify(draft, sample=sample, is_eog=lambda token: token == EOG)
    assert emitted == by_formula(draft, answers)
    assert sample.asked == len(emitted), "a row drawn but not emitted"
    assert 1 <= len(emitted) <= len(draft) + 1
    assert EOG not in emitted[:-1]


@pytest.mark.parametrize("n", range(5))
def test_every_short_draft_and_answer(n: int) -> None:
    for draft in product(range(3), repeat=n):
        for answers in product(range(3), repeat=n + 1):
            check(draft, answers)


@settings(deadline=None)
@given(st.data())
def test_long_drafts(data: st.DataObject) -> None:
    draft = data.draw(st.lists(st.integers(0, 9), max_size=40))
    agreed = data.draw(st.integers(0, len(draft)))
    rest = len(draft) + 1 - agreed
    answers = draft[:agreed] + data.draw(st.lists(st.integers(0, 9), min_size=rest, max_size=rest))
    check(draft, answers)


@pytest.mark.parametrize(
    ("draft", "answers", "emitted"),
    [
        ([], [7], [7]),
        ([], [EOG], [EOG]),
        ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 2, 3], [9, 2, 3, 4], [9]),
        ([1, 2, 3], [1, 9, 3, 4], [1, 9]),
        ([1, EOG, 3], [1, EOG, 3, 4], [1, EOG]),  # agreed on, and nothing follows an end
        ([1, EOG, 3], [1, 2, 3, 4], [1, 2]),
        ([1, 2, 3], [1, EOG, 3, 4], [1, EOG]),
        ([1, EOG], [1, EOG, 5], [1, EOG]),
    ],
)
def test_examples(draft: list[int], answers: list[int], emitted: list[int]) -> None:
    before = list(draft)
    assert verify(draft, sample=Rows(answers), is_eog=lambda token: token == EOG) == emitted
    assert draft == before


def test_a_samplers_error_passes_through() -> None:
    with pytest.raises(IndexError):
        verify([1, 2], sample=Rows([1]), is_eog=lambda token: token == EOG)
