"""The folder of conversations: names, and the room for states."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.chat import kept
from swift_gguf.chat.kept import States
from swift_gguf.errors import StateError, SwiftError


class Context:
    """A session whose state is `n` bytes, or cannot be used."""

    def __init__(self, n: int = 100, error: Exception | None = None) -> None:
        self.n, self.error = n, error

    def save_state(self, path: Path, **_: Any) -> int:
        path.write_bytes(b"x" * self.n)
        return self.n

    def load_state(self, path: Path) -> Mapping[str, Any]:
        path.read_bytes()
        if self.error:
            raise self.error
        return {"first": 0}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWIFT_GGUF_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def keep(states: States, name: str, n: int = 100, at: int = 0) -> Path:
    path = kept.place(name)
    states.save(path, Context(n), n_tokens=64, notes={})  # type: ignore[arg-type]
    if at:
        os.utime(states.path(path), (at, at))
    return path


@pytest.mark.parametrize("name", ["talk", "my talk", "Grüße"])
def test_a_word_is_a_name(name: str, folder: Path) -> None:
    assert kept.place(name) == folder / "conversations" / f"{name}.json"


@pytest.mark.parametrize("path", ["./talk", "talk.json", "a/b", "/tmp/talk", "~/talk"])
def test_everything_else_is_a_path(path: str) -> None:
    assert kept.place(path) == Path(path).expanduser()


def test_the_folder_is_private(folder: Path) -> None:
    assert kept.writable("talk").parent == folder / "conversations"
    assert stat.S_IMODE((folder / "conversations").stat().st_mode) == 0o700


def test_names_are_the_latest_first(folder: Path) -> None:
    for at, name in enumerate(("old", "new", "middle.of.dots"), start=1):
        path = kept.writable("x").with_name(f"{name}.json")
        path.write_text("{}")
        os.utime(path, (at, at))
    assert kept.names() == ["new", "old"]
    assert kept.existing("old").is_file()
    with pytest.raises(SwiftError, match=r"no saved conversation 'other'; there are: new, old"):
        kept.existing("other")


def test_without_a_folder_there_are_no_names() -> None:
    assert kept.names() == []
    with pytest.raises(SwiftError, match="/save NAME saves one"):
        kept.existing("talk")


def test_those_not_used_for_longest_make_room(folder: Path) -> None:
    states = States(limit=250)
    old, used = keep(states, "old", at=1), keep(states, "used", at=2)
    os.utime(states.path(old), (3, 3))  # it was loaded since
    new = keep(states, "new")
    assert [states.size(path) for path in (old, used, new)] == [100, 0, 100]
    assert stat.S_IMODE((folder / "states").stat().st_mode) == 0o700


@pytest.mark.parametrize("error", [StateError("another model"), OSError("unreadable")])
def test_a_state_that_cannot_be_used_is_removed(error: Exception) -> None:
    states = States(limit=1000)
    path = keep(states, "talk")
    assert states.load(path, Context()) == {"first": 0}  # type: ignore[arg-type]
    assert states.load(path, Context(error=error)) is None  # type: ignore[arg-type]
    assert states.size(path) == 0
    assert states.load(path, Context()) is None  # type: ignore[arg-type]
