"""Parts of the server that need no model."""

from __future__ import annotations

import asyncio
import math
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.responses import JSONResponse

from swift_gguf.cli import main
from swift_gguf.cli.serve_command import model_name
from swift_gguf.errors import (
    ContextFullError,
    DecodeError,
    GrammarError,
    StoppedError,
    SwiftError,
    TemplateError,
)
from swift_gguf.sampling.sampling import DRAWN_SEED, SamplingOptions, llama_seed
from swift_gguf.server import served
from swift_gguf.server.answers import _telling
from swift_gguf.server.app import _failed
from swift_gguf.server.chat_requests import ChatRequest
from swift_gguf.server.errors import ApiError
from swift_gguf.server.extra import PACKAGES, require
from swift_gguf.server.guard import Guard
from swift_gguf.server.options import ServerOptions, is_loopback
from swift_gguf.server.requests import CompletionRequest, Message
from swift_gguf.server.worker import Job, Worker


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SwiftError, match=rf"{package}.*pip install 'swift-gguf\[server\]'"):
        require()


def test_loopback() -> None:
    here = ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost", "LOCALHOST", "a.localhost")
    assert all(map(is_loopback, here))
    there = ("0.0.0.0", "192.168.0.1", "::", "example.org", "localhost.example.org", "")
    assert not any(map(is_loopback, there))
    assert "secret" not in repr(ServerOptions(api_key="secret"))


def test_what_is_told_of_failures() -> None:
    """The client's fault is told in full; of ours, nothing that is in the message."""
    for error, code in (
        (TemplateError("the chat template fails"), None),
        (GrammarError("no grammar"), None),
        (ContextFullError("full"), "context_length_exceeded"),
        (ValueError("Requested tokens (9) exceed context window of 8"), "context_length_exceeded"),
    ):
        with pytest.raises(ApiError, match=re.escape(str(error))) as told, _telling():
            raise error
        assert (told.value.status, told.value.code) == (400, code)
    ours: tuple[Exception, ...] = (
        ValueError("/a/path"),
        KeyError("x"),
        DecodeError("failed"),
        MemoryError(),
    )
    for fault in ours:
        with pytest.raises(type(fault)), _telling():
            raise fault
    assert _failed(ValueError("/a/path")) == "the server failed: ValueError"


def test_arguments_of_earlier_calls_are_objects_for_a_template() -> None:
    def call(arguments: object) -> dict[str, Any]:
        return {"id": "x", "type": "function", "function": {"name": "look", "arguments": arguments}}

    given = [call('{"at": "é"}'), call("{"), call("[1]"), call({"at": 1}),
             call('{"a":' * 99_999), call('"\\ud800"'), call('{"a": "\\ud800"}')]  # fmt: skip
    message = Message.model_validate({"role": "assistant", "content": None, "tool_calls": given})
    for _ in range(2):  # what was given stays as it is
        calls = message.as_dict()["tool_calls"]
        assert calls == [call({"at": "é"}), *given[1:]]
    empty: tuple[object, ...] = ("", " \n", "null", None, "{}", {})
    for nothing in empty:
        message = Message.model_validate({"role": "assistant", "tool_calls": [call(nothing)]})
        assert message.as_dict()["tool_calls"] == [call({})]
        (joined,) = message.as_dict(calls_as_text=True)["tool_calls"]
        assert joined == call({} if nothing == {} else "{}")


@pytest.mark.parametrize(
    ("call", "lacks"),
    [
        ({"id": "x"}, "function"),
        ({"function": 3}, "function"),
        ("x", "function"),
        ({"function": {"name": "look"}}, "arguments"),
        ({"function": {"arguments": "{}"}}, "name"),
    ],
)
def test_a_malformed_earlier_call_is_refused_with_its_place(call: object, lacks: str) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(ValidationError, match=f"a call in tool_calls has no {lacks}") as told:
        ChatRequest.model_validate({"messages": turns})
    assert told.value.errors()[0]["loc"] == ("messages", 1)


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ({"a": 1}, "tool_calls is not a list"),
        ("x", "tool_calls is not a list"),
        ([{"function": {"name": 3, "arguments": "{}"}}], "the name of a call in tool_calls"),
        ([{"function": {"name": None, "arguments": "{}"}}], "the name of a call in tool_calls"),
    ],
)
def test_earlier_calls_are_a_list_of_functions_with_names(calls: object, said: str) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}]
    with pytest.raises(ValidationError, match=said) as told:
        ChatRequest.model_validate({"messages": turns})
    assert told.value.errors()[0]["loc"] == ("messages", 1)


def test_names_of_models_keep_what_follows_their_last_dot() -> None:
    for reference, name in (
        ("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b"),
        ("hf:owner/repo-v1.5", "repo-v1.5"),
        ("/models/a.b/some-1.5b.Q4_K_M.gguf", "some-1.5b.Q4_K_M"),
        ("smollm2-135m", "smollm2-135m"),
    ):
        assert model_name(reference) == name


def test_seeds_are_32_bits_of_which_none_is_drawn_anew() -> None:
    def cli(seed: int) -> int | None:
        return SamplingOptions(seed=seed).with_seed().seed

    def server(seed: int, choice: int = 0) -> int | None:
        wanted = CompletionRequest(prompt="a", seed=seed).seed_of(choice, None)
        return None if wanted is None else llama_seed(wanted)

    for seed in (0, 42, 2**32 - 2, 2**32 - 1, 2**32, 2**32 + 42, 2**53, 2**63, -2):
        assert cli(seed) == server(seed) == llama_seed(seed)
        assert 0 <= llama_seed(seed) < DRAWN_SEED
    assert cli(2**32 + 42) == 42
    assert len({cli(seed) for seed in (0, 2**32 - 2, 2**32 - 1)}) == 3
    assert server(2**32 - 2, choice=1) == cli(2**32 - 1)
    assert server(-1) is None
    assert 0 <= llama_seed(None) < DRAWN_SEED


class Nothing:
    """A model for jobs that need none."""

    def interrupt(self) -> None: ...
    def resume(self) -> None: ...
    def rest(self) -> None: ...
    def close(self) -> None: ...


def test_a_queue_of_no_length_takes_one_job_at_a_time() -> None:
    go_on = threading.Event()

    def work(_: Nothing, job: Job[Nothing]) -> Iterator[object]:
        yield "begun"
        assert go_on.wait(10)
        job.check()
        yield "done"

    async def run() -> None:
        loaded = threading.Event()
        worker = Worker(Nothing, queue_size=0, on_loaded=loaded.set)
        with pytest.raises(ApiError, match="loading"):
            worker.submit(work, timeout_s=10)
        worker.start()
        assert await asyncio.to_thread(loaded.wait, 10)
        events = worker.submit(work, timeout_s=10).events()
        assert await anext(events) == "begun"
        with pytest.raises(ApiError, match="already waiting") as refused:
            worker.submit(work, timeout_s=10)
        assert refused.value.status == 503
        go_on.set()
        assert [event async for event in events] == ["done"]

        go_on.clear()
        job = worker.submit(work, timeout_s=10)
        events = job.events()
        assert await anext(events) == "begun"
        worker.stop(job, ApiError(499, "gone"))
        with pytest.raises(ApiError, match="gone"):
            await anext(events)
        go_on.set()
        await asyncio.to_thread(worker.close)
        with pytest.raises(ApiError, match="shutting down"):
            worker.submit(work, timeout_s=10)

    asyncio.run(run())


def test_a_model_is_closed_when_nobody_uses_it_any_more() -> None:
    """After the end was announced, too, there are those who still tokenize."""
    is_closed = threading.Event()

    class Model(Nothing):
        def close(self) -> None:
            is_closed.set()

    loaded = threading.Event()
    worker = Worker(Model, queue_size=1, on_loaded=loaded.set)
    worker.start()
    assert loaded.wait(10)
    with worker.vocabulary():
        worker.drain(reason="the server is shutting down")
        with pytest.raises(ApiError, match="shutting down"):
            worker.require_model()
        assert not is_closed.wait(0.1)
        worker.close(wait_s=0.1)
        assert not is_closed.is_set()
    assert is_closed.wait(10)


def test_the_end_while_the_model_loads() -> None:
    told = threading.Event()

    def load() -> Nothing:
        assert told.wait(10)
        raise StoppedError("the load was stopped")

    loaded = threading.Event()
    worker = Worker(load, queue_size=1, on_loaded=loaded.set, stop_loading=told.set)
    worker.start()
    worker.close()
    assert not worker.is_stuck
    assert worker.error is None
    assert not loaded.is_set()


def test_a_model_that_comes_after_the_end_is_closed_unsaid() -> None:
    told, is_closed, loaded = threading.Event(), threading.Event(), threading.Event()

    class Model(Nothing):
        def close(self) -> None:
            is_closed.set()

    def load() -> Model:
        assert told.wait(10)
        return Model()

    worker = Worker(load, queue_size=1, on_loaded=loaded.set, stop_loading=told.set)
    worker.start()
    worker.close()
    assert is_closed.wait(10)
    assert not loaded.is_set()


def test_a_load_that_cannot_be_stopped_is_not_waited_for() -> None:
    go_on = threading.Event()

    def load() -> Nothing:
        assert go_on.wait(20)
        return Nothing()

    worker = Worker(load, queue_size=1, on_loaded=lambda: None)
    worker.start()
    start = time.monotonic()
    worker.close()
    assert time.monotonic() - start < 5
    assert worker.is_stuck
    go_on.set()


# -- room for bodies -------------------------------------------------------------------------------


class Client:
    """A request of 100 bytes on its way through a guard, and what it hears."""

    def __init__(self, guard: Guard, path: str = "/answer", *, size: int = 100) -> None:
        self.started: dict[str, Any] = {}
        self._messages: list[dict[str, Any]] = [{"type": "http.request", "body": b"x" * size}]
        if path == "/leave":
            self._messages[0]["more_body"] = True
            self._messages.append({"type": "http.disconnect"})
        host = (b"host", b"127.0.0.1")
        scope = {"type": "http", "method": "POST", "path": path, "headers": [host]}
        self.task = asyncio.ensure_future(guard(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        return self._messages.pop(0)

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.started = message

    @property
    def status(self) -> int:
        return int(self.started.get("status", 0))


@pytest.mark.parametrize("way", ["/answer", "/fail", "/cancel", "/leave"])
def test_bodies_share_a_room(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Who finds it full is told; whatever becomes of the others, their room is free again."""
    monkeypatch.setattr("swift_gguf.server.options.MAX_HELD_BODIES", 250)

    async def run() -> None:
        go_on = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await go_on.wait()
            if scope["path"] == "/fail":
                raise ValueError
            await JSONResponse({})(scope, receive, send)

        async def outcomes(*clients: Client) -> list[int]:
            await asyncio.gather(*(client.task for client in clients), return_exceptions=True)
            return [client.status for client in clients]

        guard = Guard(app, options=ServerOptions(max_body=100))
        for _ in range(5):
            clients = [Client(guard, way), Client(guard, way)]
            await asyncio.sleep(0.01)
            if way == "/cancel":
                assert all(client.task.cancel() for client in clients)
            go_on.set()
            assert await outcomes(*clients) == [200 if way == "/answer" else 0] * 2
            go_on.clear()
        held = [Client(guard), Client(guard)]
        refused, small = Client(guard), Client(guard, size=50)
        assert await outcomes(refused) == [503]
        assert int(dict(refused.started["headers"])[b"retry-after"]) >= 1
        go_on.set()
        assert await outcomes(*held, small) == [200, 200, 200]

    asyncio.run(run())


# -- memory ----------------------------------------------------------------------------------------


def test_free_pages_are_given_back_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    times, given = iter([100.0, 100.1, 105.0, 121.0, 121.2]), []
    monkeypatch.setattr(served, "monotonic", lambda: next(times))
    monkeypatch.setattr(served, "give_back_free_pages", lambda: given.append(True))
    llama: Any = SimpleNamespace(_tidied_at=-math.inf)
    job: Any = None
    for expected in (1, 1, 2):
        with served.ServedLlama.working_for(llama, job):
            pass
        assert len(given) == expected


def test_serve_has_large_buffers_given_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def called() -> None:
        raise SwiftError("called")

    monkeypatch.setattr("swift_gguf.native.memory.give_back_large_buffers", called)
    model = tmp_path / "model.gguf"
    model.write_bytes(b"")
    with pytest.raises(SystemExit, match="1"):
        main(["serve", str(model), "--port", "0"])
    assert "called" in capsys.readouterr().err
