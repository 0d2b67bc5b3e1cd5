"""Suites of prompts: what is read, and what is said of what cannot be."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift_gguf.errors import SuiteError
from swift_gguf.prepare.prompts import PROMPTS
from swift_gguf.suite import BUILT_IN, Row, read_suite


def write(folder: Path, *rows: object) -> Path:
    path = folder / "suite.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"category": "math", "question_id": 3, "turns": ["1 + 1?", "and 2 + 2?"], "more": 1},
        {"turns": ["é"]},
    )
    assert read_suite(path) == [
        Row(category="math", question_id="3", turns=("1 + 1?", "and 2 + 2?")),
        Row(category="", question_id="2", turns=("é",)),
    ]


@pytest.mark.parametrize(
    "row",
    [[], "text", 3, None, {}, {"turns": []}, {"turns": "text"}, {"turns": [1]}, {"turns": [" "]}],
)
def test_other_lines_are_named(row: object, tmp_path: Path) -> None:
    path = write(tmp_path, {"turns": ["x"]}, row)
    with pytest.raises(SuiteError, match="line 2"):
        read_suite(path)


def test_lines_end_where_json_lines_do(tmp_path: Path) -> None:
    """What else ends a line in Unicode may stand in a string as it is; a file may have a mark."""
    text = "a\u2028b\u2029c\x85d\x7fe"
    row = json.dumps({"turns": [text]}, ensure_ascii=False)
    path = tmp_path / "suite.jsonl"
    path.write_bytes(f"\ufeff{row}\r\n\n{row}\n".encode())
    assert [found.turns for found in read_suite(path)] == [(text,), (text,)]
    path.write_bytes(row.encode("utf-16-le"))
    with pytest.raises(SuiteError, match=f"{path} is not UTF-8"):
        read_suite(path)


def test_no_file_and_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="No such file"):
        read_suite(tmp_path / "none.jsonl")
    with pytest.raises(SuiteError, match="has no prompts"):
        read_suite(write(tmp_path))


@given(content=st.binary(max_size=60))
def test_any_bytes_are_a_suite_or_an_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    with suppress(SuiteError):
        assert all(row.turns for row in read_suite(path))


def test_built_in_prompts_differ() -> None:
    assert len(set(BUILT_IN)) == len(BUILT_IN) >= 10


def test_drafts_are_not_calibrated_on_what_they_are_measured_on() -> None:
    assert not set(PROMPTS) & set(BUILT_IN)
