"""llama.cpp's server with --spec-type swift: the same tokens, its own figures, what it refuses."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.errors import NativeLibraryError
from swift_gguf.learning.profile import Store
from swift_gguf.model import Model
from swift_gguf.native.load import find_llama_server
from tests.native.llama_servers import FINGERPRINT, Server, serving, where_rows_are_free

Tiny = Callable[..., Path]
Opener = Callable[..., Model]
SWIFT = ("--spec-type", "swift")
N_REQUESTS = 200


@pytest.fixture(scope="module")
def binary() -> Path:
    try:
        return find_llama_server()
    except NativeLibraryError:
        pytest.skip("llama-server is not built (make llama-server)")


def requests() -> list[dict[str, Any]]:
    """Copied, new and mixed text, greedy and sampled."""
    chance = random.Random(11)
    words = ["the", "cat", "sat", "on", "a", "mat", "then", "it", "ran", "away", "hello", "world"]

    def said(n: int) -> str:
        return " ".join(chance.choice(words) for _ in range(n))

    made = []
    for number in range(N_REQUESTS):
        phrase = said(chance.randrange(2, 6))
        prompt = [phrase * 6, said(20), f"{phrase} {said(5)} {phrase} {said(5)} {phrase}"][
            number % 3
        ]
        options: dict[str, Any] = {"n_predict": chance.choice((1, 2, 17, 48))}
        if number % 2:
            options |= {"temperature": 0.8, "seed": number}
        if number % 7 == 0:
            options |= {"repeat_penalty": 1.1}
        made.append({"prompt": prompt} | options)
    return made


def tokens(server: Server) -> tuple[list[list[int]], int, int]:
    """Of each request; draft tokens, and how many were accepted."""
    answers = [server.complete(**request) for request in requests()]
    timings = [answer["timings"] for answer in answers]
    return (
        [answer["tokens"] for answer in answers],
        sum(each.get("draft_n", 0) for each in timings),
        sum(each.get("draft_n_accepted", 0) for each in timings),
    )


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0"])
def test_one_slot_gives_the_tokens_of_no_speculation(
    quant: str, binary: Path, tiny: Tiny, open_model: Opener, tmp_path: Path
) -> None:
    path = tiny("llama", quant=quant)
    profile = where_rows_are_free(open_model(path), tmp_path)
    swift = (*SWIFT, "--swift-profile", str(profile))
    with serving(binary, path, tmp_path / "none.log", "-np", "1") as server:
        plain, n_drafted, _ = tokens(server)
        assert n_drafted == 0
    with serving(binary, path, tmp_path / "swift.log", "-np", "1", *swift) as server:
        drafted, n_drafted, n_accepted = tokens(server)
    assert drafted == plain
    assert n_drafted > n_accepted > N_REQUESTS  # there were right drafts and wrong ones
    # the control: llama.cpp's own switch accepts draft tokens by chance
    forced = (*swift, "--spec-synth-len", "4")
    with serving(binary, path, tmp_path / "forced.log", "-np", "1", *forced) as server:
        wrong, _, _ = tokens(server)
    assert wrong != plain


def test_several_slots_give_the_tokens_of_one(
    binary: Path, tiny: Tiny, open_model: Opener, tmp_path: Path
) -> None:
    """Rows do not depend on other slots' cells, where our kernels run."""
    path = tiny("llama", quant="Q8_0")
    profile = where_rows_are_free(open_model(path), tmp_path)
    swift = (*SWIFT, "--swift-profile", str(profile))
    asked = requests()[:64]
    with serving(binary, path, tmp_path / "one.log", "-np", "1") as server:
        alone = [server.complete(**request)["tokens"] for request in asked]
    with (
        serving(binary, path, tmp_path / "four.log", "-np", "4", *swift) as server,
        ThreadPoolExecutor(4) as clients,
    ):
        answers = list(clients.map(lambda request: server.complete(**request), asked))
    assert [answer["tokens"] for answer in answers] == alone
    assert sum(answer["timings"].get("draft_n_accepted", 0) for answer in answers) > 0


def test_a_request_and_the_metrics(
    binary: Path, tiny: Tiny, open_model: Opener, tmp_path: Path
) -> None:
    path = tiny("llama", quant="Q8_0")
    profile = where_rows_are_free(open_model(path), tmp_path)
    flags = (*SWIFT, "--swift-profile", str(profile), "--metrics")
    prompt = "hello world " * 8
    with serving(binary, path, tmp_path / "log", *flags) as server:
        drafted = server.complete(prompt)
        plain = server.complete(prompt, **{"speculative.n_max": 0})
        short = server.complete(prompt, **{"speculative.n_max": 1})
        metrics = server.get("/metrics")
    assert drafted["timings"]["draft_n"] > 0
    assert plain["timings"].get("draft_n", 0) == 0
    assert 0 < short["timings"]["draft_n"] < drafted["timings"]["draft_n"]
    assert drafted["tokens"] == plain["tokens"] == short["tokens"]
    assert "llamacpp:" in metrics


def test_lists_of_types(binary: Path, tiny: Tiny, open_model: Opener, tmp_path: Path) -> None:
    path = tiny("llama", quant="Q8_0")
    profile = where_rows_are_free(open_model(path), tmp_path)
    flags = ("--spec-type", "ngram-simple,swift", "--swift-profile", str(profile))
    with serving(binary, path, tmp_path / "log", *flags) as server:
        found = server.complete("hello world " * 8)
    with serving(binary, path, tmp_path / "none", "--spec-type", "none") as server:
        assert server.complete("hello world " * 8)["tokens"] == found["tokens"]


def test_what_was_learned_is_in_the_profile(binary: Path, tiny: Tiny, tmp_path: Path) -> None:
    path, profile = tiny("llama", quant="Q8_0"), Store(tmp_path / "new").path(FINGERPRINT)
    with serving(binary, path, tmp_path / "log", *SWIFT, "--swift-profile", str(profile)) as server:
        server.complete("hello world " * 4)
    stored = Store(tmp_path / "new").load(FINGERPRINT)
    assert stored is not None
    assert stored.costs
    assert stored.recycling


@pytest.mark.parametrize("bad", ["profile", "sidecar"])
def test_a_file_of_another_model_is_one_line_and_the_server_runs(
    bad: str, binary: Path, tiny: Tiny, tmp_path: Path
) -> None:
    path = tiny("llama", quant="Q8_0")
    profile, other = tmp_path / f"{FINGERPRINT}.json", tiny("gemma3")
    profile.write_text(json.dumps({"version": 1, "n_layer": 99, "known": [], "costs": {}}))
    content = profile.read_bytes()
    given = {"profile": profile, "sidecar": other}[bad]
    with serving(binary, path, tmp_path / "log", *SWIFT, f"--swift-{bad}", str(given)) as server:
        assert server.complete("hello")["tokens"]
        assert server.log.count("is not used") == 1
    assert profile.read_bytes() == content  # and it is not overwritten


def test_a_model_that_cannot_go_back_runs_plainly(binary: Path, tiny: Tiny, tmp_path: Path) -> None:
    with serving(binary, tiny("mamba"), tmp_path / "log", *SWIFT) as server:
        answer = server.complete("hello")
        assert answer["tokens"]
        assert answer["timings"].get("draft_n", 0) == 0
        assert server.log.count("swift: no speculation") == 1


def test_openais_client_and_curl(binary: Path, tiny: Tiny, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    curl = shutil.which("curl")
    messages = [{"role": "user", "content": "hello"}]
    with serving(binary, tiny("llama", quant="Q8_0"), tmp_path / "log", *SWIFT) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        options = {"model": "any", "max_tokens": 8, "temperature": 0}
        whole = client.chat.completions.create(messages=messages, **options)
        parts = client.chat.completions.create(messages=messages, stream=True, **options)
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert (whole.choices[0].message.content or "") == text
        assert whole.usage.completion_tokens > 0
        if curl:
            body = json.dumps({"messages": messages} | options)
            command = [curl, "-s", f"{server.url}/v1/chat/completions", "-d", body]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert (json.loads(done.stdout)["choices"][0]["message"]["content"] or "") == text
