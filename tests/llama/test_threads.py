"""Streams that go from thread to thread, as web frameworks have it; and two threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from swift_gguf.errors import SwiftError
from swift_gguf.llama import Llama

PROMPT = "One, two, three, one, two,"
SAMPLING: dict[str, Any] = {"max_tokens": 60, "temperature": 0.8, "seed": 4}


@pytest.fixture
def llama(open_llama: Callable[..., Any]) -> Any:
    made = open_llama()
    made.speculation.idle()  # the search has a thread of its own
    return made


@pytest.fixture
def expected(llama: Llama) -> str:
    return said(llama.create_completion(PROMPT, **SAMPLING))


def said(response: Any) -> str:
    return str(response["choices"][0]["text"])


def in_a_thread(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for ever"


def test_a_response_of_starlettes(llama: Llama, expected: str) -> None:
    """Each piece may come from another thread of a pool."""
    names = set()

    def pieces() -> Iterator[str]:
        for chunk in llama.create_completion(PROMPT, stream=True, **SAMPLING):
            names.add(threading.current_thread().name)
            yield said(chunk)

    app = Starlette(routes=[Route("/", lambda request: StreamingResponse(pieces()))])
    assert TestClient(app).get("/").text == expected
    assert threading.current_thread().name not in names


def test_a_thread_for_each_piece_and_another_that_closes(llama: Llama, expected: str) -> None:
    stream = llama.create_completion(PROMPT, stream=True, **SAMPLING)
    got = [said(next(stream))]
    for _ in range(5):
        in_a_thread(lambda: got.append(said(next(stream))))
    in_a_thread(stream.close)
    assert expected.startswith("".join(got))
    assert said(llama.create_completion(PROMPT, **SAMPLING)) == expected


def test_a_stream_that_is_left_alone_blocks_nobody(llama: Llama, expected: str) -> None:
    left = llama.create_completion("A", stream=True, max_tokens=50)
    next(left)
    done: list[str] = []
    in_a_thread(lambda: done.append(said(llama.create_completion(PROMPT, **SAMPLING))))
    assert done == [expected]
    assert list(left), "it may still go on"


@pytest.mark.parametrize("stream", [False, True])
def test_two_threads_at_once_are_told(llama: Llama, expected: str, stream: bool) -> None:
    """llama.cpp would crash.  The one that came first goes on."""
    inside, go_on = threading.Event(), threading.Event()

    def wait(ids: Any, scores: Any) -> bool:
        inside.set()
        assert go_on.wait(60)
        return False

    done: list[str] = []

    def ask() -> None:
        answer = llama.create_completion(PROMPT, stopping_criteria=wait, stream=stream, **SAMPLING)
        done.append("".join(map(said, answer)) if stream else said(answer))

    first = threading.Thread(target=ask)
    first.start()
    assert inside.wait(60)
    for action in (
        lambda: llama.create_completion("A", max_tokens=1),
        lambda: next(llama.create_completion("A", max_tokens=1, stream=True)),
        lambda: llama.create_chat_completion([{"role": "user", "content": "A"}], max_tokens=1),
        lambda: next(llama.generate([40, 41])),
        lambda: llama.eval([40]),
        llama.save_state,
    ):
        with pytest.raises(SwiftError, match="another thread is using this llama"):
            action()
    go_on.set()
    first.join(60)
    assert done == [expected]
    assert said(llama.create_completion(PROMPT, **SAMPLING)) == expected
