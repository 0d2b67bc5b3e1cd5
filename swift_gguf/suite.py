"""Prompt suites in Spec-Bench's format, and a few built-in prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from swift_gguf.errors import SuiteError
from swift_gguf.text_files import read_text


@dataclass(frozen=True, kw_only=True)
class Row:
    """The user's turns of a conversation, at least one."""

    category: str
    question_id: str
    turns: tuple[str, ...]


BUILT_IN = (
    "Explain how a bicycle stays upright when it moves, for a reader of twelve years.",
    "Write a Python function that merges two sorted lists, with a docstring and an example.",
    "Write an e-mail to a landlord about a heating that has been broken for a week.",
    "A train leaves at 9:40 and arrives at 13:05 after two stops of 10 minutes each. How long did "
    "it move? Show the steps.",
    "Summarize the plot of Romeo and Juliet in five sentences.",
    "Translate to German: The meeting was moved to Thursday because half of the team is ill.",
    "List the advantages and disadvantages of working from home as a table.",
    "Explain what this does: for i in range(1, 101): print('Fizz' * (i % 3 == 0) + 'Buzz' * "
    "(i % 5 == 0) or i)",
    "Write the beginning of a detective story that is set in a lighthouse.",
    "What are the main differences between TCP and UDP, and when would you use which?",
    "Give me a week of simple vegetarian dinners with a shopping list.",
    "Write a SQL query that finds the three customers with the largest total of orders last year.",
)
"""Prompts of many kinds, so that a search does not adapt to one kind."""


def read_suite(path: Path) -> list[Row]:
    """The rows of a JSON-lines file: ``{"category", "question_id", "turns": [..]}``.

    Raises:
        SuiteError: the file cannot be read, or a line has another form.
    """
    # not `splitlines`: it also splits at characters that JSON strings may contain, such as U+2028
    lines = read_text(path, error=SuiteError).split("\n")
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise SuiteError(f"{path} has no prompts")
    return rows


def _row(path: Path, number: int, line: str) -> Row:
    try:
        values = json.loads(line)
        turns = values["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError
        if not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise ValueError
        return Row(
            category=str(values.get("category", "")),
            question_id=str(values.get("question_id", number)),
            turns=tuple(turns),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SuiteError(
            f'{path}, line {number}: not of the form {{"category", "question_id", "turns": [..]}}'
        ) from None
