"""Whatever a client sends, it is told in one form what is wrong, and the server goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.server.options import MAX_CONTENT_LENGTH, MAX_TOKEN_IDS
from tests.server.conftest import Server

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def told(status: int, body: dict[str, Any], expected: int = 400) -> dict[str, Any]:
    """The error of a response in OpenAI's form."""
    assert status == expected, body
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


def chat(**fields: object) -> dict[str, object]:
    return {"messages": HELLO, "max_tokens": 4, **fields}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a", "name": "\\udfff"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: body[:40].decode("latin-1"),
)
def test_malformed_bodies(server: Server, body: bytes) -> None:
    told(*server.post(CHAT, body))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty: send a JSON object"),
        (b"[]", "the body: must be an object"),
        (b"{}", "messages: it is missing"),
        (b'{"messages": ["x"]}', "messages.0: must be an object"),
        (
            b'{"messages": [{"role": "user", "content": "a"}], "tools": 3}',
            "tools: Input should be a valid list",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"function": 3}]}',
            "tools.0.function: must be an object",
        ),
    ],
)
def test_what_is_no_request_is_told_in_words_of_json(
    server: Server, body: bytes, message: str
) -> None:
    assert told(*server.post(CHAT, body))["message"] == message


def test_bodies_in_other_encodings(server: Server) -> None:
    """JSON with a byte order mark, or in UTF-16, is read; in Latin-1 it is none."""
    text = json.dumps(chat(messages=[{"role": "user", "content": "café"}]), ensure_ascii=False)
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le"):
        assert server.post(CHAT, text.encode(encoding))[0] == 200
    error = told(*server.post(CHAT, text.encode("latin-1")))
    assert error["message"] == "the body is not valid JSON: it is not UTF-8"
    assert error["code"] is None


def test_codes_are_no_sentences(server: Server) -> None:
    status, _, body = server.request("GET", "/v1/nothing")
    assert told(status, json.loads(body), 404)["code"] == "not_found"
    status, _, body = server.request("GET", CHAT)
    assert told(status, json.loads(body), 405)["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ({"messages": HELLO * 3000}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"max_completion_tokens": "many"}, "max_completion_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 129}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"tool_choice": "x"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"top_logprobs": 1000}, "top_logprobs"),
        ({"logit_bias": {"no token": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1e9}}, "logit_bias.1"),
        ({"logit_bias": dict.fromkeys(map(str, range(2000)), "x")}, "logit_bias"),
        ({"grammar": "no grammar"}, "grammar"),
        ({"grammar": "root ::= " + "(" * 60_000}, "grammar"),
        ({"grammar": 'root ::= "a"{1000000}'}, "grammar"),
        ({"grammar": 'root ::= "a\0"'}, "grammar"),
        ({"grammar": "root ::= root"}, "grammar"),
        ({"grammar": "x" * 100_000}, "grammar"),
        ({"response_format": {"type": "poem"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "../../etc"}}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}] * 200}, "tools"),
    ],
    ids=str,
)  # fmt: skip
def test_fields_out_of_range(server: Server, fields: dict[str, object], param: str) -> None:
    error = told(*server.post(CHAT, chat(**fields)))
    assert (error["param"] or "").startswith(param), error


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strange"},
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        {"type": "array", "items": {"type": "string"}, "minItems": -1},
        {"type": "string", "pattern": "^(?=a)$"},
        {"type": "string", "pattern": "((("},
        {"$ref": "https://example.org/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "#/nowhere"},
        {"properties": {"a": 1}},
        {"type": 3},
        {"properties": {str(i): {"type": "string", "maxLength": 2000} for i in range(3000)}},
    ],
    ids=lambda schema: json.dumps(schema)[:50],
)
def test_schemas_that_are_none_or_too_much(server: Server, schema: dict[str, object]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error = told(*server.post(CHAT, chat(response_format=wanted)))
    assert error["param"] == "response_format"
    assert error["message"].startswith("response_format: ")


def test_schemas_of_tools_have_the_same_limits(server: Server) -> None:
    much = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    offered = [{"type": "function", "function": {"name": "x", "parameters": much}}]
    for choice in ("required", {"type": "function", "function": {"name": "x"}}):
        error = told(*server.post(CHAT, chat(tools=offered, tool_choice=choice)))
        assert error["param"] == "tools"
        message = "tools: x: properties.a: uniqueItems is not supported; leave it out"
        assert error["message"] == message


def test_grammars_can_be_refused(serve: Callable[..., Server], model: Path) -> None:
    server = serve(model, "-c", 512, "-t", 1, "--no-grammars").wait_until_ready()
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "string"}}}
    offered = [{"type": "function", "function": {"name": "x"}}]
    refused: list[dict[str, object]] = [
        {"grammar": 'root ::= "a"'},
        {"response_format": schema},
        {"tools": offered, "tool_choice": "required"},
    ]
    for fields in refused:
        assert "does not accept grammars" in told(*server.post(CHAT, chat(**fields)))["message"]
    taken: list[dict[str, object]] = [
        {"response_format": {"type": "json_object"}},
        {"tools": offered},
    ]
    for fields in taken:
        assert server.post(CHAT, chat(**fields))[0] == 200


def test_a_grammar_that_keeps_llama_cpp_busy(serve: Callable[..., Server], model: Path) -> None:
    """Nothing can stop it; but clients are told in time, and so is whoever ends the server."""
    server = serve(model, "-c", 512, "-t", 1, "--timeout", 1).wait_until_ready()
    doubling = 'root ::= "a" root "x" | "a" root "y"'
    start = time.monotonic()
    error = told(*server.post(CHAT, chat(grammar=doubling, max_tokens=100)), 408)
    assert error["code"] == "timeout"
    status, body = server.post(CHAT, chat())  # llama.cpp may be back by now
    assert status == 200 or told(status, body, 503)["code"] == "timeout"
    assert server.get("/health")[0] == 200
    assert time.monotonic() - start < 10
    assert server.terminate() == 0


def test_a_deep_schema(server: Server) -> None:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert "nested" in told(*server.post(CHAT, chat(response_format=wanted)))["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": [999_999]}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 100}, "prompt"),
        ("/v1/completions", {"prompt": "\udfff"}, None),
        ("/v1/completions", {"prompt": "a", "stop": "\udfff"}, "stop"),
        ("/v1/completions", {"prompt": "a", "grammar": 'root ::= "\udfff"'}, "grammar"),
        ("/v1/embeddings", {"input": "\udfff"}, "input"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/completions", {"prompt": "a", "best_of": 7}, "best_of"),
        ("/v1/completions", {"prompt": "a", "logprobs": 999}, "logprobs"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": ["a"] * 3000}, "input"),
        ("/v1/embeddings", {"input": {"text": "a"}}, "input"),
        ("/v1/embeddings", {"input": [999_999]}, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions"),
        ("/v1/embeddings", {"input": "a b " * 5000}, "input"),
        ("/detokenize", {"tokens": [999_999]}, "tokens"),
        ("/detokenize", {"tokens": [1] * (MAX_TOKEN_IDS + 1)}, "tokens"),
        ("/tokenize", {"content": 3}, "content"),
        ("/tokenize", {"content": "a" * (MAX_CONTENT_LENGTH + 1)}, "content"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_other_endpoints(
    server: Server, path: str, body: dict[str, object], param: str | None
) -> None:
    assert told(*server.post(path, body))["param"] == param


def test_as_much_text_as_may_be_tokenized(server: Server) -> None:
    """Every character is several tokens of this model's; memory must not go with their number."""
    psutil = pytest.importorskip("psutil")
    process = psutil.Process(server.process.pid)
    text = "\U0001f642" * MAX_CONTENT_LENGTH
    before, most = process.memory_info().rss, 0
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, "/tokenize", {"content": text, "with_pieces": True})
        while not asked.done():
            most = max(most, process.memory_info().rss)
            time.sleep(0.01)
    status, body = asked.result()
    assert status == 200
    assert b"".join(bytes(item["piece"]) for item in body["tokens"]).decode() == text
    assert most - before < 200e6
    status, body = server.post("/detokenize", {"tokens": [65] * MAX_TOKEN_IDS})
    assert status == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [{}] * 250_000}),
        ("/v1/completions", {"prompt": [[{}] * 250_000]}),
        ("/v1/embeddings", {"input": [1.5] * 250_000}),
        ("/detokenize", {"tokens": [-1] * 250_000}),
        (CHAT, {"messages": [1] * 250_000}),
        (CHAT, {"messages": [{"role": "user", "content": [1] * 250_000}]}),
        (CHAT, chat(stop=[1] * 250_000)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_with_many_faults(server: Server, path: str, body: dict[str, object]) -> None:
    """All are refused for the first, while the others wait."""
    encoded = json.dumps(body).encode()
    start = time.monotonic()
    told(*server.post(path, encoded))
    assert time.monotonic() - start < 1


def test_null_is_what_is_not_there(server: Server) -> None:
    names = ("model", "temperature", "top_p", "top_k", "seed", "stop", "n", "stream", "logit_bias",
             "stream_options", "mirostat", "mirostat_tau", "mirostat_eta", "grammar")  # fmt: skip
    nothing = dict.fromkeys(names)
    tool = {"type": "function", "function": {"name": "x", "parameters": None, "strict": None}}
    usage = {"include_usage": None}
    body = {"messages": [{**HELLO[0], "name": None}], "max_completion_tokens": 4}
    for fields in (nothing, {"tools": [tool], "stream_options": usage, "logprobs": None}):
        assert server.post(CHAT, {**body, **fields})[0] == 200
    asked = {**nothing, "prompt": "a", "echo": None, "max_tokens": None, "top_k": -1}
    status, answer = server.post("/v1/completions", asked)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 16)  # as OpenAI documents
    assert told(*server.post(CHAT, {"messages": None}))["param"] == "messages"


def test_a_prompt_longer_than_the_context(server: Server) -> None:
    long = [{"role": "user", "content": "word " * 10_000}]
    for stream in (False, True):
        error = told(*server.post(CHAT, {"messages": long, "stream": stream}))
        assert error["code"] == "context_length_exceeded"


def test_unknown_paths_and_methods(server: Server) -> None:
    told(*server.get("/v1/nothing"), 404)
    told(*server.get("/../../etc/passwd"), 404)
    told(*server.get("/%2e%2e/%2e%2e/etc/passwd"), 404)
    told(*server.get(CHAT), 405)


def test_an_oversized_body(serve: Callable[..., Server], model: Path) -> None:
    server = serve(model, "-c", 512, "-t", 1, "--max-body", 2000).wait_until_ready()
    huge = chat(messages=[{"role": "user", "content": "x" * 3000}])
    assert "--max-body" in told(*server.post(CHAT, huge), 413)["message"]

    with socket.create_connection(server.address, timeout=10) as client:  # no length given
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        # at once: the server answers, and closes, as soon as it has read too much
        client.sendall(4 * (b"400\r\n" + b"x" * 1024 + b"\r\n"))
        assert client.recv(100).startswith(b"HTTP/1.1 413")
    assert server.post(CHAT, chat())[0] == 200


def test_no_json(server: Server) -> None:
    body = json.dumps(chat()).encode()
    told(*server.post(CHAT, body, **{"Content-Type": "text/plain"}), 415)
    told(*server.post(CHAT, body, **{"Content-Type": "application/x-www-form-urlencoded"}), 415)
    assert server.post(CHAT, body, **{"Content-Type": "application/json; charset=utf-8"})[0] == 200


def test_other_peoples_pages(server: Server) -> None:
    """A web page must not use a server that asks for no key, be it by a form or by rebinding."""
    told(*server.post(CHAT, chat(), Origin="https://evil.example"), 403)
    told(*server.post(CHAT, chat(), Origin="null"), 403)
    told(*server.post(CHAT, chat(), Origin="http://[broken"), 403)
    told(
        *server.post(CHAT, chat(), Host="evil.example:8080", Origin="http://evil.example:8080"), 403
    )
    told(*server.get("/props", Host="evil.example"), 403)
    for origin in (f"http://{server.host}", "http://localhost:3000", "tauri://localhost"):
        assert server.post(CHAT, chat(), Origin=origin)[0] == 200


def test_cors(serve: Callable[..., Server], model: Path) -> None:
    origin = "https://chat.example.org"
    server = serve(model, "-c", 512, "-t", 1, "--cors", origin).wait_until_ready()
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    status, headers, _ = server.request("OPTIONS", CHAT, None, asked)
    assert (status, headers["access-control-allow-origin"]) == (200, origin)
    status, headers, _ = server.request("POST", CHAT, chat(), {"Origin": origin})
    assert (status, headers["access-control-allow-origin"]) == (200, origin)
    status, headers, _ = server.request("POST", CHAT, chat(), {"Origin": "https://evil.example"})
    assert status == 403
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("source", ["flag", "variable", "file"])
def test_keys(serve: Callable[..., Server], model: Path, tmp_path: Path, source: str) -> None:
    (tmp_path / "key").write_text("sesame-open\n", encoding="utf-8-sig")
    flags: dict[str, list[object]] = {
        "flag": ["--api-key", "sesame-open"],
        "file": ["--api-key-file", tmp_path / "key"],
    }
    environment = {"SWIFT_GGUF_API_KEY": "sesame-open"} if source == "variable" else {}
    server = serve(model, "-c", 512, "-t", 1, *flags.get(source, []), **environment)
    server.wait_until_ready()
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer sesame-ope"},
        {"Authorization": "Bearer sesame-open-"},
        {"Authorization": "Basic sesame-open"},
        {"Authorization": "sesame-open"},
        {"Authorization": "Bearer \xe9"},
        {"X-Api-Key": "wrong"},
    ):
        error = told(*server.post(CHAT, chat(), **headers), 401)
        assert error["code"] == "invalid_api_key"
    for path in ("/props", "/metrics", "/v1/models"):
        assert server.request("GET", path)[0] == 401
    for path in ("/", "/health"):
        assert server.request("GET", path)[0] == 200
    assert server.post(CHAT, chat(), Authorization="Bearer sesame-open")[0] == 200
    assert server.post(CHAT, chat(), **{"X-Api-Key": "sesame-open"})[0] == 200
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # as `curl -d` has it
    assert server.post(CHAT, chat(), **form, **{"X-Api-Key": "sesame-open"})[0] == 200
    told(*server.post(CHAT, chat(), **form), 401)
    assert not any("sesame" in line for line in server.log)


def test_an_open_address_warns(serve: Callable[..., Server], model: Path) -> None:
    assert "--api-key" in serve(model, "-c", 512, "--host", "0.0.0.0").expect("warning")
    quiet = serve(model, "-c", 512, "--host", "0.0.0.0", "--api-key", "k").wait_until_ready()
    assert not any("warning" in line for line in quiet.log)


def test_slow_senders_are_cut_off(serve: Callable[..., Server], model: Path) -> None:
    server = serve(model, "-c", 512, "-t", 1, "--receive-timeout", 1).wait_until_ready()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
    for sent in ("", "GET /hea", f"{head}Content-Length: 100\r\n\r\n" + '{"mess'):
        start = time.monotonic()
        with socket.create_connection(server.address, timeout=20) as client:
            client.sendall(sent.encode())
            received = client.recv(10_000)
        assert received == b"" or received.startswith(b"HTTP/1.1 408"), sent
        assert time.monotonic() - start < 5
    assert server.get("/health")[0] == 200


def test_bytes_that_are_no_http(server: Server) -> None:
    for junk in (b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 100,
                 b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n"):  # fmt: skip
        with socket.create_connection(server.address, timeout=20) as client:
            try:
                client.sendall(junk)
                client.shutdown(socket.SHUT_WR)
                assert client.recv(100)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 403")
            except ConnectionError:
                pass
    assert server.get("/health") == (200, {"status": "ok"})
