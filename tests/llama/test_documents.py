"""The Python in docs/python.md runs as it stands there, on a small model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("n", range(len(EXAMPLES)))
def test_an_example(tiny_path: str, tmp_path: Path, n: int) -> None:
    for name in ("model.gguf", "small.gguf"):
        shutil.copy(tiny_path, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES[n]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout or "print(" not in EXAMPLES[n]
