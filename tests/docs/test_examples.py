"""The Python in the documents runs as it stands there, on a small model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    f"{page}-{n}": example
    for page in ("README.md", "docs/python.md", "docs/llm.md")
    for n, example in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    )
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(tiny_path: str, tmp_path: Path, name: str) -> None:
    for file in ("model.gguf", "small.gguf"):
        shutil.copy(tiny_path, tmp_path / file)
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES[name]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout or "print(" not in EXAMPLES[name]
