"""Whatever a request holds, nothing of it becomes the path of a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the packages of the extra `server` are not installed")
pytest.importorskip("httpx", reason="starlette's test client needs it")

import time

from starlette.testclient import TestClient

from swift_gguf.errors import TemplateError
from swift_gguf.model import ModelOptions
from swift_gguf.server.app import create_app
from swift_gguf.server.options import ServerOptions
from swift_gguf.server.served import ServedLlama
from swift_gguf.server.service import Service
from swift_gguf.speculation import SpeculationOptions

MARK = "canary-of-the-tests"
SECRET = "nobody-may-read-this"
_watching: list[set[str]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """What Python is asked to open, list or run; hooks cannot be taken back, so it may be idle."""
    if _watching and event in ("open", "os.listdir", "os.scandir", "subprocess.Popen", "os.exec"):
        _watching[-1].add(str(arguments))


sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[set[str]]:
    _watching.append(set())
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


@pytest.fixture(scope="module")
def client(tiny: Callable[..., Path]) -> Iterator[TestClient]:
    path = tiny("llama", quant="Q8_0")
    options = ServerOptions(alias="tiny", host="127.0.0.1", api_key="key")
    loading = ModelOptions(n_ctx=512, n_threads=1, n_gpu_layers=0)
    service = Service(
        lambda: ServedLlama.load(path, loading, SpeculationOptions(mode="off"), options), options
    )
    with TestClient(create_app(service), headers={"Authorization": "Bearer key"}) as client:
        while client.get("/health").status_code != 200:
            time.sleep(0.01)
        yield client


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    path = tmp_path / MARK
    path.write_text(SECRET)
    return path


def bodies(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Requests with a path wherever there may be text."""
    message = {"role": "user", "content": path, "name": path, "file": path, "image_url": path}
    chat: dict[str, Any] = {"messages": [message], "max_tokens": 2, "seed": 1}
    yield "/v1/chat/completions", chat
    for field in ("model", "grammar", "stop", "user", "chat_template", "template", "lora", "cache",
                  "prompt_cache", "draft_model", "mmproj", "slot_save_path", "state"):  # fmt: skip
        yield "/v1/chat/completions", {**chat, field: path}
    image = {"type": "image_url", "image_url": {"url": path}}
    yield "/v1/chat/completions", {**chat, "messages": [{"role": "user", "content": [image]}]}
    schema = {"$ref": path, "$id": path, "type": "object", "properties": {"a": {"$ref": path}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    yield "/v1/chat/completions", {**chat, "response_format": form}
    function = {"name": "f", "description": path, "parameters": schema}
    yield "/v1/chat/completions", {**chat, "tools": [{"type": "function", "function": function}]}
    for field in ("model", "suffix", "grammar"):
        yield "/v1/completions", {"prompt": path, "max_tokens": 2, field: path}
    yield "/v1/embeddings", {"input": path, "model": path}
    yield "/tokenize", {"content": path}


def test_no_path_in_a_request_is_opened(client: TestClient, canary: Path) -> None:
    n_answered = 0
    with watched() as seen:
        for form in (str(canary), f"file://{canary}", f"../../../../../../..{canary}"):
            for route, body in bodies(form):
                answer = client.post(route, json=body)
                assert answer.status_code < 500, (route, body, answer.text)
                assert SECRET not in answer.text
                n_answered += answer.status_code == 200
        for route in (f"/{canary}", f"/..{canary}", f"/static/..%2f..%2f{MARK}", f"//{canary}"):
            assert client.get(route).status_code in (400, 404)
    assert n_answered > 20
    assert not [what for what in seen if MARK in what]


def test_an_opened_file_would_be_seen(canary: Path) -> None:
    with watched() as seen:
        canary.read_text()
    assert [what for what in seen if MARK in what]


def test_swift_llama_opens_nothing_it_is_sent(tiny: Callable[..., Path], canary: Path) -> None:
    from swift_gguf import Llama

    llama = Llama(str(tiny("llama", gaps=True)), n_threads=1, n_gpu_layers=0, verbose=False)
    known = {"messages", "max_tokens", "seed", "stop", "tools", "prompt", "suffix"}
    said = []
    with watched() as seen:
        for _, body in bodies(str(canary)):
            if not set(body) <= known:
                continue
            create = llama.create_completion if "prompt" in body else llama.create_chat_completion
            with suppress(TemplateError):  # of what is no text
                said.append(create(**body))
    assert len(said) >= 4
    assert SECRET not in str(said)
    llama.close()
    assert not [what for what in seen if MARK in what]
