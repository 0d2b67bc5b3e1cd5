"""Conversations that come back go on without reading their history again."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swift_gguf.chat import kept
from swift_gguf.chat.kept import States
from swift_gguf.errors import SwiftError
from swift_gguf.model import Model
from tests.chat.test_chat import Talk

OpenModel = Callable[..., Model]
LONG = "the cat sat on the mat and the dog sat on the cat " * 4
FAMILIES = ["llama", "gemma3", "mamba"]  # all cells, a window, a running state


@pytest.fixture(params=FAMILIES)
def path(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Path:
    return tiny(request.param, quant="Q8_0")


@pytest.fixture
def begin(open_model: OpenModel, path: Path, tmp_path: Path) -> Iterator[Callable[..., Talk]]:
    """A chat in a context of its own."""
    made: list[Talk] = []

    def begin_(*, limit: int = 1 << 30, n_ctx: int = 1024) -> Talk:
        talk = Talk(open_model(path, n_ctx=n_ctx))
        talk.chat.states = States(limit=limit, folder=tmp_path / "states")
        made.append(talk)
        return talk

    yield begin_
    for talk in made:
        talk.session.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "talk.json"


def test_only_what_is_new_is_decoded(begin: Callable[..., Talk], file: Path) -> None:
    """And the answer is that of the chat which went on."""
    talk = begin()
    talk.say(LONG)
    talk.say("More")
    talk.say(f"/save {file}")
    assert "and the state of the context (" in talk.notes
    (state,) = (file.parent / "states").iterdir()
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    talk.say("And?")

    again = begin()
    again.say("something else")
    again.say(f"/load {file}")
    assert "and the state of the context" in again.notes
    again.say("And?")
    assert again.turns[-1].tokens == talk.turns[-1].tokens
    assert again.prompt_n <= talk.prompt_n + 1 < 40

    without = begin()
    without.chat.states = None
    without.say(f"/load {file}")
    without.say("And?")
    assert without.prompt_n > 150
    assert without.turns[-1].tokens == talk.turns[-1].tokens


@pytest.mark.parametrize("damage", ["cut", "changed", "another context", "another file"])
def test_a_state_that_cannot_be_used_costs_time_only(
    begin: Callable[..., Talk], file: Path, damage: str
) -> None:
    talk = begin()
    talk.say(LONG)
    talk.say(f"/save {file}")
    talk.say("And?")
    (state,) = (file.parent / "states").iterdir()
    content = state.read_bytes()
    if damage == "cut":
        state.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        state.write_bytes(content[:-900] + bytes([content[-900] ^ 1]) + content[-899:])
    elif damage == "another file":
        state.write_bytes(b"something else" * 100)
    again = begin(n_ctx=2048 if damage == "another context" else 1024)
    again.say(f"/load {file}")
    assert "loaded 1 turn" in again.notes
    assert "the state of the context" not in again.notes
    assert not state.exists()
    again.say("And?")
    assert again.prompt_n > 150
    assert again.turns[-1].tokens == talk.turns[-1].tokens


def test_a_state_beyond_the_limit_is_not_kept(begin: Callable[..., Talk], file: Path) -> None:
    talk = begin(limit=10_000)
    talk.say(LONG)
    talk.say(f"/save {file}")
    assert "the state of the context is not kept: the state is larger than" in talk.notes
    assert list((file.parent / "states").iterdir()) == []
    assert file.exists()


def test_what_is_saved_is_listed(
    begin: Callable[..., Talk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWIFT_GGUF_DATA", str(tmp_path / "data"))
    talk = begin()
    with pytest.raises(SwiftError, match="no conversation is saved"):
        talk.say("/load")
    talk.say(LONG)
    talk.say("/save tale")
    kept.writable("broken").write_text("{")
    said = talk.say("/load")
    assert re.search(r"^tale +1 turn +\d{4}-.* state [0-9.]+ MB$", said, re.MULTILINE)
    assert re.search(r"^broken +damaged", said, re.MULTILINE)
    with pytest.raises(SwiftError, match="there is no saved conversation 'other'; there are: "):
        talk.say("/load other")
