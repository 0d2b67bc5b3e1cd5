"""The acceptance rule, against its formula."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_gguf.drafting.tree import Tree
from swift_gguf.drafting.verification import Verdict, verify
from tests.unit.fake_model import shapes

EOG = 0


def is_eog(token: int) -> bool:
    return token == EOG


def verify_chain(draft: Sequence[int], answers: Sequence[int]) -> tuple[Verdict, Rows]:
    """Node i of a chain is followed by row i + 1."""
    rows = Rows(answers)
    return verify(Tree.chain(draft), choose=lambda node: rows(node + 1), is_eog=is_eog), rows


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
    verdict, rows = verify_chain(draft, answers)
    emitted = verdict.tokens
    assert emitted == by_formula(draft, answers)
    assert rows.asked == len(emitted), "a row drawn but not emitted"
    agreed = sum(a == b for a, b in zip(emitted, draft, strict=False))
    assert verdict.accepted == list(range(agreed))
    assert verdict.kept == list(range(len(emitted) - 1))
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
    assert verify_chain(draft, answers)[0].tokens == emitted
    assert draft == before


def test_a_samplers_error_passes_through() -> None:
    with pytest.raises(IndexError):
        verify_chain([1, 2], [1])


@pytest.mark.parametrize("n", range(1, 7))
def test_trees_follow_the_targets_choices(n: int) -> None:
    """Of every tree and every node, the target's path to that node is accepted, and no more."""
    for parents in shapes(n):
        # siblings differ; a token says where it is
        tree = Tree([node + 1 for node in range(n)], parents, [1.0] * n)
        for last in range(-1, n):
            path = [token - 1 for token in tree.path(last)]
            choices = dict(zip([-1, *path], [*(node + 1 for node in path), 99], strict=True))
            verdict = verify(tree, choose=choices.__getitem__, is_eog=is_eog)
            assert verdict.accepted == verdict.kept == path
            assert verdict.tokens == [*tree.path(last), 99]
