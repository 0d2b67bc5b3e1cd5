"""A load that somebody wants to end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.errors import ModelError, StoppedError
from swift_gguf.model import Model, ModelOptions
from swift_gguf.native.binding import Library, StopFlag, library
from swift_gguf.server.options import ServerOptions
from swift_gguf.server.served import ServedLlama
from swift_gguf.speculation import SpeculationOptions

FEW = ModelOptions(n_ctx=256, n_threads=1, n_gpu_layers=0)


@pytest.fixture
def path(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", quant="Q8_0")


@pytest.fixture
def up() -> StopFlag:
    flag = StopFlag()
    flag.raise_()
    return flag


@pytest.fixture
def at_first_progress(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`at_first_progress(do)`: that is done when llama.cpp first tells how far it is."""
    original = Library.unless_stopped

    def set_up(do: Callable[[], None]) -> None:
        def unless_stopped(self: Library, flag: StopFlag) -> Any:
            goes_on = original(self, flag)
            calls: list[float] = []

            def first(progress: float, data: object) -> bool:
                if not calls:
                    calls.append(progress)
                    do()
                return bool(goes_on(progress, data))

            first.__module__ = Library.__module__  # as the one that it stands for
            return library().api.llama_progress_callback(first)

        monkeypatch.setattr(Library, "unless_stopped", unless_stopped)

    return set_up


def test_a_flag_that_is_up_ends_a_load(path: Path, up: StopFlag) -> None:
    with pytest.raises(StoppedError, match="load was stopped"):
        Model(path, FEW, stop=up)
    up.lower()
    with Model(path, FEW, stop=up) as model:
        model.decode([1, 2, 3])
        up.raise_()  # it is the model's, too
        with pytest.raises(StoppedError):
            model.decode([1, 2, 3])


def test_a_flag_that_goes_up_meanwhile(path: Path, at_first_progress: Callable[..., None]) -> None:
    flag = StopFlag()
    at_first_progress(flag.raise_)
    with pytest.raises(StoppedError, match="load was stopped"):
        Model(path, FEW, stop=flag)


def test_a_load_for_the_server(path: Path, up: StopFlag, tmp_path: Path) -> None:
    def load(path: Path, flag: StopFlag) -> ServedLlama:
        return ServedLlama.load(path, FEW, SpeculationOptions(), ServerOptions(), stop=flag)

    with pytest.raises(StoppedError, match="load was stopped"):
        load(path, up)
    up.lower()
    llama = load(path, up)
    llama.interrupt()
    assert up.is_up
    llama.close()
    (tmp_path / "no.gguf").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError):
        load(tmp_path / "no.gguf", StopFlag())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_load(
    path: Path,
    at_first_progress: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    library()._catch_interrupts()  # pytest has put its own hook before ours

    def leave(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, leave)
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    try:
        at_first_progress(lambda: os.kill(os.getpid(), number))
        with pytest.raises(expected):
            Model(path, FEW)
        at_first_progress(lambda: os.kill(os.getpid(), number))
        with pytest.raises(expected):
            ServedLlama(str(path), n_ctx=256, n_threads=1, verbose=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    with library().messages():
        pass  # nothing is left of it
