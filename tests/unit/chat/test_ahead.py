"""What is certain of a text that is being typed, and the thread that reads it, without a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift_gguf.chat import ahead as ahead_module
from swift_gguf.chat.ahead import LONGEST_WORD, ReadAhead, finished
from swift_gguf.errors import DecodeError, StoppedError, SwiftError
from swift_gguf.session import Session

TEXTS = st.text(alphabet="ab \n\t.漢", max_size=60) | st.text(max_size=60)


@given(TEXTS, TEXTS)
def test_what_is_finished_stays_whatever_is_typed_on(text: str, more: str) -> None:
    assert text.startswith(finished(text))
    assert finished(text + more).startswith(finished(text))


@given(TEXTS)
def test_all_but_a_word_is_finished(text: str) -> None:
    rest = text[len(finished(text)) :]
    assert len(rest.strip()) <= LONGEST_WORD
    assert len(rest.split()) <= 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("Hel", ""),
        ("Hello", ""),
        ("Hello ", "Hello"),
        ("Hello  wor", "Hello"),
        ("Hello world.\n\n", "Hello world."),
        ("漢" * 30, "漢" * (30 - LONGEST_WORD)),
    ],
)
def test_a_word_is_finished_when_the_next_one_begins(text: str, expected: str) -> None:
    assert finished(text) == expected


# -- the thread ------------------------------------------------------------------------------------


class Flag:
    def __init__(self) -> None:
        self.is_up = threading.Event()

    def raise_(self) -> None:
        self.is_up.set()

    def lower(self) -> None:
        self.is_up.clear()


class SlowModel:
    """Its tokens are characters.  A pass lasts until `let` allows it, or the flag stops it."""

    def __init__(self, *, rollback_refusal: str | None = None) -> None:
        self.rollback_refusal = rollback_refusal
        self.stop = Flag()
        self.tokens: list[int] = []
        self.passes: list[str] = []
        """What each pass read; one that was stopped ends with an exclamation mark."""
        self.error: Exception | None = None
        self.is_in_pass = threading.Event()
        self.may_go = threading.Event()
        self.may_go.set()

    @property
    def text(self) -> str:
        return "".join(map(chr, self.tokens))

    def decode(self, tokens: Sequence[int], *, n_outputs: int) -> None:
        assert n_outputs == 0
        text = "".join(map(chr, tokens))
        self.is_in_pass.set()
        try:
            if self.error:
                raise self.error
            deadline = time.monotonic() + 20
            while not self.may_go.wait(0.001):
                assert time.monotonic() < deadline
                if self.stop.is_up.is_set():
                    self.passes.append(f"{text}!")
                    raise StoppedError("stopped")
        finally:
            self.is_in_pass.clear()
        self.passes.append(text)
        self.tokens.extend(tokens)

    def rollback(self, n_past: int) -> None:
        assert self.rollback_refusal is None or n_past == len(self.tokens)
        del self.tokens[n_past:]

    def clear(self) -> None:
        self.tokens.clear()


class Typist:
    """A person at a prompt that begins with `^`."""

    def __init__(self, model: SlowModel) -> None:
        self.model = model
        self.begun: list[str] = []
        self.error: Exception | None = None
        self.ahead = ReadAhead(cast(Session, self), self._tokens)

    def exclusive(self, *, renews: bool) -> AbstractContextManager[None]:
        assert not renews
        return nullcontext()

    def _tokens(self, line: str) -> list[int]:
        self.begun.append(line)
        if self.error:
            raise self.error
        return list(map(ord, "^" + finished(line)))

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, (self.model.passes, self.begun)
            time.sleep(0.001)

    def rest(self) -> None:
        """Until all that is certain is read."""
        self.wait(lambda: self.ahead._due is None and not self.ahead._works)


@pytest.fixture
def typist(monkeypatch: pytest.MonkeyPatch) -> Iterator[Typist]:
    monkeypatch.setattr(ahead_module, "PAUSE_S", 0.0)
    made = Typist(SlowModel())
    yield made
    made.model.may_go.set()
    made.ahead.close()
    assert not made.ahead._thread.is_alive()


def test_the_beginning_is_read_at_once_and_words_when_they_are_finished(typist: Typist) -> None:
    typist.ahead.changed("too early ")
    with typist.ahead.typing():
        typist.rest()
        assert typist.model.text == "^"
        for line in ("o", "on", "one", "one t", "one tw", "one two", "one two "):
            typist.ahead.changed(line)
            typist.rest()
    assert typist.model.passes == ["^", "one", " two"]
    typist.ahead.changed("too late ")
    typist.rest()
    assert typist.model.text == "^one two"


def test_a_long_text_is_read_in_batches(typist: Typist, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "BATCH", 4)
    with typist.ahead.typing():
        typist.ahead.changed("abcdefghij k")
        typist.rest()
    assert typist.model.passes[-3:] == ["abcd", "efgh", "ij"]


def test_nothing_is_read_while_keys_are_pressed(
    typist: Typist, monkeypatch: pytest.MonkeyPatch
) -> None:
    with typist.ahead.typing():
        typist.rest()
        monkeypatch.setattr(ahead_module, "PAUSE_S", 600)
        typist.ahead.changed("one two")
        time.sleep(0.05)
        assert typist.model.passes == ["^"]
        monkeypatch.setattr(ahead_module, "PAUSE_S", 0)
        typist.ahead.changed("one two ")
        typist.rest()
    assert typist.model.passes == ["^", "one two"]


def test_deleted_text_stops_its_pass_and_appended_text_does_not(typist: Typist) -> None:
    model = typist.model
    with typist.ahead.typing():
        typist.rest()
        model.may_go.clear()
        typist.ahead.changed("one two three")
        typist.wait(model.is_in_pass.is_set)
        for line in ("one two three four", "one two thr", "one two "):
            typist.ahead.changed(line)
            assert not model.stop.is_up.is_set()
        typist.ahead.changed("one tw")
        typist.wait(lambda: len(model.passes) == 2)
        model.may_go.set()
        typist.rest()
    assert model.passes == ["^", "one two!", "one"]
    assert not model.stop.is_up.is_set()


def test_what_comes_before_the_message_is_read_whatever_is_typed(typist: Typist) -> None:
    typist.model.may_go.clear()
    with typist.ahead.typing():
        typist.wait(typist.model.is_in_pass.is_set)
        for line in ("one two", "", "x"):
            typist.ahead.changed(line)
            assert not typist.model.stop.is_up.is_set()
        typist.model.may_go.set()
        typist.rest()
    assert typist.model.passes == ["^"]


def test_edited_text_is_rolled_back_to_where_it_differs(typist: Typist) -> None:
    with typist.ahead.typing():
        typist.ahead.changed("one two three ")
        typist.rest()
        typist.ahead.changed("one ")  # it may come back
        typist.rest()
        assert typist.model.text == "^one two three"
        typist.ahead.changed("one two four ")
        typist.rest()
    assert typist.model.passes[-1] == "four"
    assert typist.model.text == "^one two four"


def test_enter_waits_for_the_batch_under_way_and_for_no_other(
    typist: Typist, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead_module, "BATCH", 4)
    model = typist.model
    with typist.ahead.typing():
        typist.rest()
        model.may_go.clear()
        typist.ahead.changed("abcdefghij k")
        typist.wait(model.is_in_pass.is_set)
        threading.Timer(0.05, model.may_go.set).start()
    assert not typist.ahead._works
    assert model.passes == ["^", "abcd"]


@pytest.mark.parametrize("key", [KeyboardInterrupt, EOFError])
def test_ctrl_c_and_ctrl_d_stop_the_pass(typist: Typist, key: type[BaseException]) -> None:
    model = typist.model

    def press() -> None:
        with typist.ahead.typing():
            typist.rest()
            model.may_go.clear()
            typist.ahead.changed("one two")
            typist.wait(model.is_in_pass.is_set)
            raise key

    with pytest.raises(key):
        press()
    assert model.passes == ["^", "one!"]
    assert not model.stop.is_up.is_set()
    model.may_go.set()
    with typist.ahead.typing():  # and the next prompt is read again
        typist.ahead.changed("one two")
        typist.rest()
    assert model.text == "^one"


def test_ctrl_c_while_enter_waits_frees_the_model(
    typist: Typist, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wait = typist.model, typist.ahead._state.wait
    interrupted: list[bool] = []

    def interrupting(timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread() and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return wait(timeout)

    monkeypatch.setattr(typist.ahead._state, "wait", interrupting)

    def send() -> None:
        with typist.ahead.typing():
            typist.rest()
            model.may_go.clear()
            typist.ahead.changed("one two")
            typist.wait(model.is_in_pass.is_set)

    with pytest.raises(KeyboardInterrupt):
        send()
    assert interrupted
    assert model.passes == ["^", "one!"]
    assert not typist.ahead._works


@pytest.mark.parametrize("error", [DecodeError("broken"), SwiftError("no such file")])
def test_an_error_ends_the_reading_of_a_line(typist: Typist, error: Exception) -> None:
    with typist.ahead.typing():
        typist.rest()
        typist.model.error = typist.error = error
        typist.ahead.changed("one two")
        typist.rest()
        assert typist.model.text == "^"
        typist.model.error = typist.error = None
        typist.ahead.changed("one two ")
        typist.rest()
    assert typist.model.text == "^one two"


def test_a_bug_ends_reading_and_not_the_prompt(
    typist: Typist, caplog: pytest.LogCaptureFixture
) -> None:
    with typist.ahead.typing():
        typist.rest()
        typist.error = ZeroDivisionError("a bug")
        typist.ahead.changed("one two")
        typist.wait(lambda: not typist.ahead._thread.is_alive())
        typist.ahead.changed("one two ")
    with typist.ahead.typing():
        pass
    assert "nothing is read ahead any more: a bug" in caplog.text


def test_a_model_that_takes_nothing_back_reads_no_typed_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ahead_module, "PAUSE_S", 0.0)
    typist = Typist(SlowModel(rollback_refusal="it is recurrent"))
    with typist.ahead, typist.ahead.typing():
        typist.ahead.changed("one two ")
        typist.rest()
    assert typist.model.passes == ["^"]
