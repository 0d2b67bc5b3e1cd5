"""Medians with their spread, tables, and what machine it is."""

from __future__ import annotations

import pytest

from swift_gguf.bench.spread import Spread, table
from swift_gguf.bench.subject import machine


def test_spread_is_median_and_quartiles() -> None:
    found = Spread.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found.min, found.q1, found.median, found.q3, found.n) == (1.0, 2.0, 3.0, 4.0, 5)


def test_spread_does_not_move_with_one_interrupted_pass() -> None:
    assert Spread.of([10.0] * 9 + [5000.0]).median == 10.0


def test_spread_of_one_value_and_of_none() -> None:
    only = Spread.of([7.0])
    assert only.q1 == only.median == only.q3 == 7.0
    with pytest.raises(ValueError, match="at least one round"):
        Spread.of([])


def test_spread_text() -> None:
    assert Spread.of([1.0, 2.0, 3.0]).text() == "2.00 (1.50-2.50)"
    assert Spread.of([1.0, 2.0, 3.0]).text(0) == "2 (2-2)"


def test_table_aligns_columns() -> None:
    lines = table(["name", "ms"], [["a", "1.00"], ["longer", "10.00"]]).splitlines()
    assert lines == ["name       ms", "-------------", "a        1.00", "longer  10.00"]


def test_machine_is_named() -> None:
    here = machine()
    assert here.cpu
    assert here.cores >= 1
