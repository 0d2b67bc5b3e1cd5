"""The rows that `swift-gguf bench` answers: of files in Spec-Bench's form, or built in."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path

from swift_gguf.errors import SuiteError
from swift_gguf.suite import BUILT_IN, Row, read_suite

EVERYDAY = "everyday"
CODE_EDITING = "code-editing"
NAMES = (EVERYDAY, CODE_EDITING)


def load(
    suites: Sequence[str], *, categories: Collection[str] = (), limit: int | None = None
) -> list[Row]:
    """Rows of all suites, a row of each category in turn, so that any part of a run is a sample.

    suites: names of `NAMES`, or paths.
    categories: leave out all others; empty: none.
    limit: at most so many rows.

    Raises:
        SuiteError: a file is no suite, or no row is left.
    """
    rows = [row for suite in suites for row in _read(suite)]
    known = {row.category for row in rows}
    if unknown := set(categories) - known:
        raise SuiteError(
            f"there is no category {', '.join(sorted(unknown))}; there are "
            f"{', '.join(sorted(known))}"
        )
    chosen = [row for row in rows if not categories or row.category in categories]
    return pick(chosen, len(chosen) if limit is None else limit, seed=0)


def pick(rows: Sequence[Row], n: int, *, seed: int) -> list[Row]:
    """At most n rows: one of each category, then a second one of each, ...; drawn by the seed."""
    by_category: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_category[row.category].append(row)
    rng = random.Random(seed)
    groups = list(by_category.values())
    rng.shuffle(groups)
    for group in groups:
        rng.shuffle(group)
    tiers = zip_longest(*groups)
    return [row for tier in tiers for row in tier if row is not None][:n]


def _read(suite: str) -> list[Row]:
    if suite == EVERYDAY:
        return [
            Row(category=EVERYDAY, question_id=str(number), turns=(text,))
            for number, text in enumerate(BUILT_IN, 1)
        ]
    if suite == CODE_EDITING:
        return read_suite(Path(__file__).with_name("code_editing.jsonl"))
    return read_suite(Path(suite))
