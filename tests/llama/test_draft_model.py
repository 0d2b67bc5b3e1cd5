"""`SwiftDraftModel` under llama_cpp's own verifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from swift_gguf.llama import SwiftDraftModel, SwiftLlama
from tests.llama.conftest import without_ids

from llama_cpp import Llama  # isort: skip

PROMPT = "over the hills and over the hills and over the hills and over the"


def test_answers_are_the_same(open_llama: Callable[..., Any], tiny_path: str) -> None:
    plain = open_llama(Llama)
    drafted = []

    class Watched(SwiftDraftModel):
        def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
            draft = super().__call__(input_ids, **kwargs)
            drafted.extend(draft.tolist())
            return draft

    drafting = open_llama(Llama, draft_model=Watched(model_path=tiny_path))
    for values in ({"temperature": 0.0}, {"seed": 3}, {"seed": 4, "repeat_penalty": 1.1}):
        for prompt in (PROMPT, PROMPT + " hills and", "something else"):
            answers = [
                without_ids(llama.create_completion(prompt, max_tokens=50, **values))
                for llama in (plain, drafting)
            ]
            assert answers[0] == answers[1]
    assert drafted


def test_what_was_said_before_is_drafted() -> None:
    draft = SwiftDraftModel(num_pred_tokens=4)
    text = [*range(20, 40), 1, *range(20, 30)]
    assert draft(np.array(text, np.intc)).tolist() == [30, 31, 32, 33]
    assert draft(np.array([*text, 30, 31], np.intc)).dtype == np.intc


def test_nothing_is_drafted_where_nothing_repeats() -> None:
    draft = SwiftDraftModel()
    for n in range(1, 40):
        assert draft(np.array([7 * i % 101 for i in range(n)], np.intc)).size == 0


def test_guesses_that_turn_out_wrong_are_given_up() -> None:
    """After every third token another one follows than the last time."""
    draft, text, drafted = SwiftDraftModel(), list[int](), list[int]()
    rng = np.random.default_rng(1)
    for _ in range(400):
        text += [5, 6, int(rng.integers(10, 1000))]
        drafted.append(len(draft(np.array([*text, 5, 6], np.intc))))
    assert sum(drafted[-100:]) < 0.1 * max(1, sum(drafted[:100])) + 5


def test_what_was_learned_of_the_model_is_used(
    open_llama: Callable[..., Any], tiny_path: str
) -> None:
    learner = open_llama(SwiftLlama)
    for seed in range(3):
        learner.create_completion(PROMPT, max_tokens=60, seed=seed)
    learner.swift.save()
    assert len(SwiftDraftModel(model_path=tiny_path)._recycling) > 50
    with pytest.raises(ValueError, match="cannot be read"):
        SwiftDraftModel(model_path="nowhere.gguf")
