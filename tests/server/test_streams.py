"""Many clients at once, clients that leave, queues that are full, and the end of a server."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from swift_gguf.server.options import MAX_CONTENT_LENGTH, SPARE_CONNECTIONS
from tests.server.conftest import COMMAND, Server

CHAT = "/v1/chat/completions"


def talk(words: int = 20_000, *, stream: bool = True, **fields: object) -> dict[str, Any]:
    """A request whose answer takes long: seconds for the default."""
    messages = [{"role": "user", "content": "Talk."}]
    return {"messages": messages, "max_tokens": words, "stream": stream, "seed": 1, **fields}


class Stream:
    """A request whose answer is read line by line."""

    def __init__(self, server: Server, body: dict[str, Any], path: str = CHAT) -> None:
        self._connection = http.client.HTTPConnection(server.host, timeout=60)
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", path, json.dumps(body), headers)
        self.response = self._connection.getresponse()

    def __iter__(self) -> Any:
        """The events, parsed; ``[DONE]`` as a string."""
        for line in self.response:
            if line.startswith(b"data: "):
                data = line[6:].decode().rstrip("\n")
                yield data if data == "[DONE]" else json.loads(data)

    def leave(self) -> None:
        """As a client that crashes."""
        if sock := self._connection.sock:
            sock.close()
        self.response.close()
        self._connection.close()


def text(events: list[Any]) -> str:
    return "".join(
        event["choices"][0]["delta"].get("content") or ""
        for event in events
        if event != "[DONE]" and event["choices"]
    )


@pytest.fixture
def busy(serve: Callable[..., Server], model: Path) -> Server:
    """Long answers fit, and two may wait."""
    flags = ("-c", 32768, "-t", 1, "--queue-size", 2, "--drain", 20)
    return serve(model, *flags).wait_until_ready()


def wait_for(server: Server, metric: str, value: float) -> None:
    end = time.monotonic() + 20
    while server.metric(f"llamacpp:{metric}") != value:
        assert time.monotonic() < end, f"{metric} is not {value}"
        time.sleep(0.005)


def test_a_client_that_leaves_stops_its_answer(busy: Server) -> None:
    stream = Stream(busy, talk())
    next(iter(stream))
    stream.leave()
    start = time.monotonic()
    busy.wait_until_idle()
    assert time.monotonic() - start < 1
    assert 0 < busy.metric("llamacpp:tokens_predicted_total") < 5000
    assert busy.post(CHAT, talk(4, stream=False))[0] == 200


def test_a_client_that_leaves_without_a_stream(busy: Server) -> None:
    with socket.create_connection(busy.address) as client:
        body = json.dumps(talk(stream=False)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {busy.host}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(busy, "requests_processing", 1)
    start = time.monotonic()
    busy.wait_until_idle()
    assert time.monotonic() - start < 1


def test_a_client_that_leaves_during_the_prompt(busy: Server) -> None:
    """A long prompt is decoded in few long passes, which end at once."""
    prompt = [{"role": "user", "content": "word " * 15_000}]
    with socket.create_connection(busy.address) as client:
        body = json.dumps(talk(messages=prompt)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {busy.host}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(busy, "requests_processing", 1)
        time.sleep(0.2)
    start = time.monotonic()
    busy.wait_until_idle()
    assert time.monotonic() - start < 1
    assert busy.post(CHAT, talk(4, stream=False))[0] == 200


@pytest.mark.parametrize("way", ["kept", "closed", "twice", "stream"])
def test_a_client_that_does_not_read(serve: Callable[..., Server], model: Path, way: str) -> None:
    flags = ("-c", 32768, "-t", 1, "--timeout", 1.5, "--alias", "x" * 50_000)  # for long events
    server = serve(model, *flags).wait_until_ready()
    psutil = pytest.importorskip("psutil")
    process = psutil.Process(server.process.pid)

    def is_connected() -> bool:
        return any(one.raddr for one in process.net_connections("tcp"))

    path: str = CHAT if way == "stream" else "/tokenize"
    long = {"content": "\U0001f642" * MAX_CONTENT_LENGTH, "with_pieces": True}
    body = json.dumps(talk() if way == "stream" else long).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n" + "Connection: close\r\n" * (way == "closed")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = server.host.split(":")
        client.connect((host, int(port)))
        client.sendall((head.encode() + b"\r\n" + body) * (1 + (way == "twice")))
        client.recv(1)  # the answer has begun
        assert is_connected()
        end = time.monotonic() + 6
        while is_connected():
            assert time.monotonic() < end, "still there"
            time.sleep(0.05)
    assert server.terminate() == 0


def test_a_client_that_leaves_the_queue(busy: Server) -> None:
    first = Stream(busy, talk())
    next(iter(first))
    with socket.create_connection(busy.address) as client:
        body = json.dumps(talk()).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {busy.host}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(busy, "requests_deferred", 1)
    wait_for(busy, "requests_deferred", 0)
    first.leave()


def test_a_full_queue(busy: Server) -> None:
    first = Stream(busy, talk())
    next(iter(first))
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(busy.post, CHAT, talk(4, stream=False)) for _ in range(2)]
        wait_for(busy, "requests_deferred", 2)
        status, headers, body = busy.request("POST", CHAT, talk(4))
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert json.loads(body)["error"]["code"] == "queue_full"
        assert busy.get("/health")[0] == 200  # what needs no model is answered
        first.leave()
        assert [future.result()[0] for future in waiting] == [200, 200]


def test_bodies_that_are_too_large_together(serve: Callable[..., Server], model: Path) -> None:
    server = serve(model, "-c", 32768, "-t", 1).wait_until_ready()
    large = talk(4, stream=False, padding="x" * 4_100_000)
    first = Stream(server, talk(n=8, padding="x" * 4_100_000))
    with ThreadPoolExecutor(7) as pool:
        waiting = [pool.submit(server.post, CHAT, large) for _ in range(7)]
        wait_for(server, "requests_deferred", 7)
        assert server.post("/tokenize", {"content": "a"})[0] == 200
        status, headers, body = server.request("POST", CHAT, large)
        assert (status, json.loads(body)["error"]["code"]) == (503, "queue_full")
        assert int(headers["retry-after"]) >= 1
        first.leave()
        assert [future.result()[0] for future in waiting] == [200] * 7
    assert server.post(CHAT, large)[0] == 200


def test_too_many_connections(serve: Callable[..., Server], model: Path) -> None:
    server = serve(model, "-c", 512, "-t", 1, "--queue-size", 0).wait_until_ready()
    address = server.address
    idle = [socket.create_connection(address) for _ in range(SPARE_CONNECTIONS)]
    status, headers, body = server.request("POST", CHAT, talk(4, stream=False))
    assert (status, json.loads(body)["error"]["code"]) == (503, "queue_full")
    assert int(headers["retry-after"]) >= 1
    for connection in idle:
        connection.close()
    end = time.monotonic() + 10
    while server.post(CHAT, talk(4, stream=False))[0] == 503:
        assert time.monotonic() < end


def test_concurrent_clients_get_their_own_answers(server: Server) -> None:
    prompts = [f"Tell me about {i}." for i in range(8)]

    def ask(prompt: str, stream: bool) -> str:
        body = talk(
            40, stream=stream, messages=[{"role": "user", "content": prompt}], temperature=0
        )
        if stream:
            return text(list(Stream(server, body)))
        return str(server.post(CHAT, body)[1]["choices"][0]["message"]["content"])

    alone = [ask(prompt, False) for prompt in prompts]
    assert len(set(alone)) == len(prompts)
    with ThreadPoolExecutor(16) as pool:
        jobs = [(p, s) for s in (True, False) for p in prompts] * 2
        assert list(pool.map(lambda job: ask(*job), jobs)) == alone * 4


def test_a_reader_that_stalls_does_not_hold_up_others(busy: Server) -> None:
    stalled = Stream(busy, talk(2000))
    assert stalled.response.status == 200  # and reads no more
    assert busy.post(CHAT, talk(4, stream=False))[0] == 200
    assert list(stalled)[-1] == "[DONE]"  # everything was kept for it


def test_requests_that_take_too_long(serve: Callable[..., Server], model: Path) -> None:
    flags = ("-c", 32768, "-t", 1, "--timeout", 0.7)
    server = serve(model, *flags).wait_until_ready()
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        events = []
        for event in Stream(server, talk()):
            waiting = waiting or pool.submit(server.post, CHAT, talk(4, stream=False))
            events.append(event)
        assert events[-1]["error"]["code"] == "timeout"
        assert waiting is not None
        # its turn came just before its end, on a busy machine too late for an answer, or just after
        status, body = waiting.result()
        assert status == 200 or (status in (408, 503) and body["error"]["code"] == "timeout")
    status, body = server.post(CHAT, talk(stream=False))
    assert (status, body["error"]["code"]) == (408, "timeout")


def test_health_while_the_model_is_loaded(serve: Callable[..., Server], slow_to_load: Path) -> None:
    server = serve(slow_to_load, "-c", 512)
    assert server.get("/health")[0] == 503
    status, headers, body = server.request("POST", CHAT, talk(4))
    assert (status, json.loads(body)["error"]["code"]) == (503, "loading")
    assert int(headers["retry-after"]) >= 1
    assert server.get("/v1/models")[0] == 200
    assert server.request("GET", "/")[0] == 200
    server.wait_until_ready()
    assert server.get("/health") == (200, {"status": "ok"})


@pytest.fixture
def slow_to_load(model: Path, tmp_path: Path) -> Path:
    """The model behind a pipe's end would be; here: a file that is still being read from disk.

    Costs are measured when a model is first seen, which takes a while: a profile of its own.
    """
    copy = tmp_path / "fresh.gguf"
    copy.write_bytes(model.read_bytes())
    return copy


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    server = Server(broken)
    assert server.process.wait(60) == 1
    assert server.log[-1].startswith("swift-gguf: ")
    assert not any("Traceback" in line for line in server.log)


def test_an_address_that_is_taken(server: Server, model: Path) -> None:
    port = server.host.rpartition(":")[2]
    command = subprocess.run([*COMMAND, str(model), "--port", port], capture_output=True, text=True)
    assert command.returncode == 1
    assert "--port" in command.stderr
    assert command.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [["--speculative-sampling"], ["--api-key", "é"]])
def test_flags_that_make_no_sense(model: Path, flags: list[str]) -> None:
    command = subprocess.run([*COMMAND, str(model), *flags], capture_output=True, text=True)
    assert command.returncode == 2
    assert "Traceback" not in command.stderr


def test_sigterm_lets_the_running_answer_finish(busy: Server) -> None:
    stream = Stream(busy, talk(2000))
    events = [next(iter(stream))]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(busy.post, CHAT, talk(4, stream=False))
        wait_for(busy, "requests_deferred", 1)
        busy.process.send_signal(signal.SIGTERM)
        status, body = waiting.result()
    assert (status, body["error"]["code"]) == (503, "shutting_down")
    events += list(stream)
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"][0]["finish_reason"] in ("length", "stop")
    assert busy.process.wait(30) == 0
    with pytest.raises(OSError):
        socket.create_connection(busy.address, timeout=1)


def test_sigterm_tells_an_answer_that_takes_too_long(
    serve: Callable[..., Server], model: Path
) -> None:
    server = serve(model, "-c", 32768, "-t", 1, "--drain", 0.3).wait_until_ready()
    stream = Stream(server, talk(30_000))
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    assert list(stream)[-1]["error"]["code"] == "shutting_down"
    assert server.process.wait(30) == 0


def test_sigterm_while_text_is_tokenized(busy: Server) -> None:
    """That uses the model beside its thread."""
    text = "word " * (MAX_CONTENT_LENGTH // 5)
    with ThreadPoolExecutor(4) as pool:  # one after the other, so that one is in the middle of it
        asked = [
            pool.submit(busy.post, "/tokenize", {"content": text, "with_pieces": True})
            for _ in range(4)
        ]
        time.sleep(0.4)
        busy.process.send_signal(signal.SIGTERM)
        answers = [one.result() for one in asked]
    assert {status for status, _ in answers} <= {200, 503}
    for body in [body for status, body in answers if status == 200]:
        assert "".join(item["piece"] for item in body["tokens"]) == text
    assert any(status == 200 for status, _ in answers)
    assert busy.process.wait(30) == 0


def test_ctrl_c_twice(busy: Server) -> None:
    stream = Stream(busy, talk())
    next(iter(stream))
    busy.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    busy.process.send_signal(signal.SIGINT)
    assert busy.process.wait(10) == 130
    assert not any("Traceback" in line for line in busy.log)


def test_idle_connections_do_not_delay_the_end(server: Server, busy: Server) -> None:
    connections = [socket.create_connection(busy.address) for _ in range(5)]
    start = time.monotonic()
    assert busy.terminate() == 0
    assert time.monotonic() - start < 10
    for connection in connections:
        connection.close()


def test_characters_of_several_tokens_come_whole(server: Server) -> None:
    """A grammar makes the model, whose tokens for them are single bytes, say these."""
    for word in ("größe 東京 🙂👩‍🚀 Ωμέγα", "é", "🙂", "ascii🙂"):
        for stop in ([], ["\U0001f642x", "京z"]):  # held back as possible beginnings of a stop
            body = talk(200, grammar=f'root ::= "{word}"', stop=stop)
            events = list(Stream(server, body))
            assert text(events) == word
            by_token = list(Stream(server, {**body, "logprobs": True, "top_logprobs": 1}))
            assert text(by_token) == word
            whole = server.post(CHAT, {**body, "stream": False})[1]
            assert whole["choices"][0]["message"]["content"] == word


def test_bytes_that_are_no_character_hold_nothing_up(server: Server) -> None:
    """At a high temperature any model says some."""
    body = talk(400, temperature=50)
    events = list(Stream(server, body))
    assert len(events) > 200
    whole = server.post(CHAT, {**body, "stream": False})[1]
    assert whole["choices"][0]["message"]["content"] == text(events)


def test_a_limit_in_the_middle_of_a_character(server: Server) -> None:
    """As in llama_cpp, the character is finished."""
    for n in range(3, 7):
        body = talk(n, grammar='root ::= "ab🙂"')
        assert text(list(Stream(server, body))) == "ab🙂"
        whole = server.post(CHAT, {**body, "stream": False})[1]
        assert whole["choices"][0]["message"]["content"] == "ab🙂"


@pytest.mark.skipif(which("curl") is None, reason="there is no curl")
def test_curl(server: Server) -> None:
    body = json.dumps(talk(12))
    command = [
        "curl",
        "-sN",
        f"{server.url}{CHAT}",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    events = [line for line in lines if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[0][6:])["object"] == "chat.completion.chunk"


def test_memory_stays_flat_over_many_requests(server: Server) -> None:
    psutil = pytest.importorskip("psutil")
    process = psutil.Process(server.process.pid)

    def ask(i: int) -> None:
        body = talk(8, stream=bool(i % 2), messages=[{"role": "user", "content": str(i)}])
        stream = Stream(server, body)
        if i % 3:
            list(stream.response)
        stream.leave()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(300)))
        before = process.memory_info().rss
        list(pool.map(ask, range(300)))
    grown = process.memory_info().rss - before
    assert grown < 8 << 20, f"{grown / 1e6:.1f} MB more"
    assert len(process.threads()) < 40
    assert os.path.exists(f"/proc/{process.pid}/fd") is False or process.num_fds() < 60
    assert threading.active_count() < 40
