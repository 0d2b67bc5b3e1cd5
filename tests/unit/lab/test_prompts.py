"""`lab prompts`: its table, and what it says where llama-bench fails; nothing is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.prompts import row, stock_speed
from swift_gguf.errors import SwiftError


def program(folder: Path, text: str) -> Path:
    path = folder / "llama-bench"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def speed(path: Path) -> float:
    return stock_speed(path, Path("m.gguf"), 512, threads=2, n_gpu_layers=-1)


def test_a_row_has_medians_and_the_ratio_of_rounds() -> None:
    assert row("m", 512, [100, 50, 80], [200, 150, 120]) == [
        "m", "512", "80", "150", "2.00 (1.75-2.50)",
    ]  # fmt: skip


def test_stock_is_asked_for_the_same_prompt(tmp_path: Path) -> None:
    asks = 'case "$*" in *"-m m.gguf -p 512 -n 0 -t 2 -ngl 0 -fa 1 "*) ;; *) exit 1;; esac'
    assert speed(program(tmp_path, f"{asks}\necho '[{{\"avg_ts\": 81.5}}]'")) == 81.5


def test_what_goes_wrong_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SwiftError, match="llama-bench failed: no such model"):
        speed(program(tmp_path, "echo a; echo no such model >&2; exit 1"))
    with pytest.raises(SwiftError, match="cannot be run: No such file"):
        speed(tmp_path / "missing")
