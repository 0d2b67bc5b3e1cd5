"""Signals that come while something computes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from swift_gguf.interrupts import heard


@pytest.fixture(params=["SIGINT", "SIGTERM", "SIGHUP"])
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal with a handler that does nothing."""
    number = signal.Signals[request.param]
    before = signal.signal(number, lambda *_: None)
    yield number
    signal.signal(number, before)


def test_a_signal_is_heard_in_another_thread(number: signal.Signals) -> None:
    threads, told = list[str](), threading.Event()

    def stop() -> None:
        threads.append(threading.current_thread().name)
        told.set()

    with heard(stop):
        os.kill(os.getpid(), number)
        assert told.wait(10)
    assert threads == ["swift-gguf-signals"]
    os.kill(os.getpid(), number)
    assert len(threads) == 1
    assert signal.set_wakeup_fd(-1) == -1


def test_others_who_listen_hear_it_too(number: signal.Signals) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    try:
        with heard(lambda: None):
            os.kill(os.getpid(), number)
        assert os.read(reading, 8) == bytes([number])
    finally:
        assert signal.set_wakeup_fd(-1) == writing
        os.close(reading)
        os.close(writing)


def test_other_signals_are_none_of_its_business() -> None:
    told = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with heard(told.set):
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not told.is_set()


def test_in_a_thread_it_does_nothing() -> None:
    done = []

    def work() -> None:
        with heard(lambda: None):
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
