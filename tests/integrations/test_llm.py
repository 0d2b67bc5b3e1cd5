"""The plug-in for `llm`, with the real package: its command line, and its Python interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llm
import pytest

from swift_gguf.integrations.llm import SwiftModel
from swift_gguf.llama import Llama
from tests.llama.conftest import LOADING

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
DEFAULTS = {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0}
"""swift-gguf's and llama.cpp's; llama_cpp has others."""


def ask_llm(
    home: Path, *arguments: object, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llm", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=os.environ | {"LLM_USER_PATH": str(home)},
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of the test's own for what llm keeps."""
    folder = tmp_path / "llm"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def reference(tiny_path: str) -> Iterator[Callable[..., str]]:
    """`reference([(role, text), ...], temperature=...)`: what a Llama answers by itself."""
    llama = Llama(tiny_path, flash_attn=None, **(LOADING | {"n_ctx": 4096}))

    def answer(turns: list[tuple[str, str]], **options: Any) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        response = llama.create_chat_completion(messages, **(DEFAULTS | GREEDY | options))
        return str(response["choices"][0]["message"]["content"])

    yield answer
    llama.close()


@pytest.fixture
def model(tiny_path: str) -> Iterator[SwiftModel]:
    model = SwiftModel(tiny_path)
    yield model
    if model._llama:
        model._llama.close()


def test_models_are_listed_and_nothing_is_loaded(home: Path) -> None:
    code = (
        "import json, sys, llm; print(json.dumps([model.model_id for model in llm.get_models()]));"
        "print(json.dumps(list(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"LLM_USER_PATH": str(home)},
    )
    names, modules = map(json.loads, done.stdout.splitlines())
    assert "swift/smollm2-135m" in names
    assert "llama_cpp" not in modules
    rooms = {name.split(".")[1] for name in modules if name.startswith("swift_gguf.")}
    assert rooms == {"errors", "hub", "integrations", "text_files"}


def test_a_path_answers_and_the_conversation_goes_on_from_elsewhere(
    home: Path, tiny_path: str, tmp_path: Path, reference: Callable[..., str]
) -> None:
    path = Path(tiny_path)
    options = ["-o", "temperature", "0", "-o", "max_tokens", "12"]
    first = ask_llm(
        home, "-m", f"swift/{path.name}", "-s", "Be a cat.", "Hello!", *options, cwd=path.parent
    )
    said = [("system", "Be a cat."), ("user", "Hello!")]
    answer = reference(said)
    assert first.stdout == answer + "\n", first.stderr
    second = ask_llm(home, "-c", "And then?", *options, cwd=tmp_path)
    said += [("assistant", answer), ("user", "And then?")]
    assert second.stdout == reference(said) + "\n", second.stderr
    assert f"swift/{path.resolve()}" in ask_llm(home, "models", "list").stdout
    logged = json.loads(ask_llm(home, "logs", "--json", "-n", "1").stdout)[0]
    assert logged["output_tokens"] == logged["response_json"]["timings"]["predicted_n"] == 12


def test_an_alias_of_a_path_keeps_working(home: Path, tiny_path: str, tmp_path: Path) -> None:
    path = Path(tiny_path)
    ask_llm(home, "aliases", "set", "tiny", f"swift/{path.name}", cwd=path.parent)
    done = ask_llm(home, "-m", "tiny", "Hello!", "-o", "max_tokens", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "swift/nowhere.gguf", "Hello!"], "no such file or model: nowhere.gguf"),
        (["-m", "swift/{damaged}", "Hello!"], "damaged.gguf"),
        (["-m", "swift/{tiny}", "cat " * 600, "-o", "ctx_size", "256"], "-o ctx_size N"),
        (["-m", "swift/{tiny}", "Hello!", "-o", "speculation", "magic"], "magic"),
    ],
)
def test_failures_are_one_line(
    home: Path, tiny_path: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(Path(tiny_path).read_bytes()[:1000])
    done = ask_llm(home, *(text.format(tiny=tiny_path, damaged=damaged) for text in arguments))
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_pieces_come_one_by_one_and_make_the_answer(
    model: SwiftModel, reference: Callable[..., str]
) -> None:
    pieces = list(model.prompt("Hello!", **GREEDY))
    assert len(pieces) > 3
    assert "".join(pieces) == reference([("user", "Hello!")])


def timings(response: llm.Response) -> dict[str, Any]:
    assert response.response_json is not None
    return dict(response.response_json["timings"])


def n_tokens(response: llm.Response) -> tuple[int, int]:
    """Of the prompt and of the answer."""
    usage = response.usage()
    assert usage.input is not None
    assert usage.output is not None
    return usage.input, usage.output


def test_a_conversation_decodes_only_what_is_new(model: SwiftModel) -> None:
    conversation = model.conversation()
    first = conversation.prompt("the cat sat on the mat " * 20, **GREEDY)
    first.text()
    second = conversation.prompt("And?", **GREEDY)
    second.text()
    n_new = timings(second)["prompt_n"]
    (n_first, n_answered), (n_second, _) = n_tokens(first), n_tokens(second)
    assert n_second > n_first + n_answered
    assert n_new <= n_second - n_first


def test_a_seed_repeats_an_answer_and_none_draws_another(
    model: SwiftModel, reference: Callable[..., str]
) -> None:
    hot: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12}
    one, again, fresh = (
        model.prompt("Hello!", **hot | seed).text() for seed in ({"seed": 7}, {"seed": 7}, {})
    )
    assert one == again == reference([("user", "Hello!")], **hot, seed=7)
    assert fresh != one  # 12 tokens at that temperature: the odds are nil


def test_speculation_is_what_was_asked_for_and_changes_no_text(model: SwiftModel) -> None:
    text = "the cat sat on the mat, the cat sat on the mat, the cat sat"
    responses = {
        mode: model.prompt(text, temperature=0.0, max_tokens=40, speculation=mode)
        for mode in ("off", "ngram,recycling,layer-skip")
    }
    answers = {response.text() for response in responses.values()}
    drafted = {mode: timings(r)["draft_n"] for mode, r in responses.items()}
    assert len(answers) == 1
    assert drafted["off"] == 0
    assert drafted["ngram,recycling,layer-skip"] > 0


def test_a_schema_is_followed(model: SwiftModel) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"enum": [1, 2, 3]}},
        "required": ["age"],
    }
    answer = model.prompt("How old?", schema=schema, seed=1, max_tokens=40).text()
    assert json.loads(answer)["age"] in (1, 2, 3)


def test_another_context_size_is_another_context(model: SwiftModel) -> None:
    model.prompt("Hello!", max_tokens=1, ctx_size=512).text()
    assert model._llama
    assert model._llama.n_ctx() == 512
    with pytest.raises(llm.ModelError, match="ctx_size"):
        model.prompt("cat " * 2000, ctx_size=256).text()


def test_without_a_chat_template_a_text_is_continued(tiny_path: str, tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    key = b"tokenizer.chat_template"
    path.write_bytes(Path(tiny_path).read_bytes().replace(key, key[::-1]))
    model = SwiftModel(str(path))
    answer = model.prompt("the cat", **GREEDY).text()
    assert model._llama
    again = model._llama.create_completion("the cat", **(DEFAULTS | GREEDY))
    assert answer == again["choices"][0]["text"]
    with pytest.raises(llm.ModelError, match="no chat template"):
        model.prompt("the cat", system="Be a cat.", **GREEDY).text()
    model._llama.close()


@pytest.mark.slow
def test_a_real_model(home: Path) -> None:
    model = ["-m", "swift/smollm2-135m", "-o", "temperature", "0", "-o", "max_tokens", "24"]
    done = ask_llm(home, *model, "What is a noun?")
    assert "A noun is a word" in done.stdout, (done.stdout, done.stderr)
