"""Processes of our own do not run what lies in the folder one happens to be in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from swift_gguf.templates.sandbox import command


@pytest.mark.parametrize("module", ["json", "swift_gguf", "runpy"])
def test_nothing_of_the_working_directory_is_run(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text("print('code of the folder')\n")
    worker = subprocess.run(
        command("swift_gguf.templates.sandbox", "swift_gguf.templates.template", "render"),
        cwd=tmp_path,
        input='{"source": "fine", "variables": {}}\n',
        capture_output=True,
        text=True,
    )
    assert worker.stdout == '{"text": "fine"}\n', worker.stderr
    assert worker.returncode == 0


def test_it_sees_the_modules_of_this_process_and_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_module.py").write_text("import sys; print(sys.argv[1:], __name__)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    printed = subprocess.check_output(command("own_module", "a", "b c"), text=True)
    assert printed == "['a', 'b c'] __main__\n"
