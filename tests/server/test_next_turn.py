"""After an answer, the server reads what is known of the next prompt, and nobody waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.errors import TemplateError
from swift_gguf.hub.models import resolve
from swift_gguf.model import ModelOptions
from swift_gguf.server.next_turn import MESSAGE
from swift_gguf.server.options import ServerOptions
from swift_gguf.server.served import ServedLlama
from swift_gguf.speculation import SpeculationOptions
from tests.server.conftest import Server

REAL = "smollm2-135m"

FORGETTING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == "assistant" %}{{ m.content[4:] }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Leaves a part of earlier answers out, as templates of thinking models do."""


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def converse(server: Server, *, is_read_ahead: bool, stream: bool = False) -> list[Any]:
    """Texts and timings of some turns."""
    messages = [{"role": "user", "content": "Tell me about the sea. " * 12}]
    answers = []
    for _ in range(3):
        before = server.metric("swift_gguf:prompt_tokens_read_ahead_total")
        body = {"messages": messages, "max_tokens": 20, "temperature": 0.7, "seed": 3}
        status, answer = server.post("/v1/chat/completions", body)
        assert status == 200, answer
        said = answer["choices"][0]["message"]["content"]
        answers.append((said, answer["timings"]))
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on."}]
        if is_read_ahead:
            wait_for(
                lambda: server.metric("swift_gguf:prompt_tokens_read_ahead_total") > before  # noqa: B023
            )
            time.sleep(0.2)  # until it is at the end
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("template", [None, FORGETTING])
def test_the_next_request_decodes_the_users_message_alone(
    serve: Callable[..., Server], template: str | None, tmp_path: Path
) -> None:
    options: list[Any] = [REAL, "-c", 1024]
    if template:
        (tmp_path / "template.jinja").write_text(template)
        options += ["--chat-template", tmp_path / "template.jinja"]
    ahead = serve(*options).wait_until_ready()
    plain = serve(*options, "--no-read-ahead").wait_until_ready()
    with_it = converse(ahead, is_read_ahead=True)
    without = converse(plain, is_read_ahead=False)
    assert [text for text, _ in with_it] == [text for text, _ in without]
    for (_, fast), (_, slow) in list(zip(with_it, without, strict=True))[1:]:
        # "Go on.", the end of its turn, and the opening of the answer
        assert fast["prompt_n"] <= 10
        assert slow["prompt_n"] >= fast["prompt_n"] + (15 if template else 4)
        assert fast["cache_n"] + fast["prompt_n"] == slow["cache_n"] + slow["prompt_n"]
    cached = sum(timings["cache_n"] for _, timings in with_it)
    assert ahead.metric("swift_gguf:prompt_tokens_cached_total") == cached
    assert plain.metric("swift_gguf:prompt_tokens_read_ahead_total") == 0


@pytest.fixture
def served() -> Iterator[ServedLlama]:
    llama = ServedLlama.load(
        resolve(REAL), ModelOptions(n_ctx=4096), SpeculationOptions(mode="off"), ServerOptions()
    )
    yield llama
    llama.close()


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def is_in_step(llama: ServedLlama) -> bool:
    """The context holds what llama_cpp thinks that it does."""
    assert llama._adopted is not None
    return bool(llama._adopted.tokens == llama.input_ids[: llama.n_tokens].tolist())


@pytest.mark.slow
def test_whoever_comes_meanwhile_does_not_wait(served: ServedLlama) -> None:
    long = chat("Waves come and go. " * 500)
    whole = len(served.chat_tokens({"messages": [*long["messages"], *chat(MESSAGE)["messages"]]},
                                   up_to=MESSAGE))  # fmt: skip
    waits = []
    for pause_s in (0.05, 0.11, 0.17, 0.23):
        with served.speculation.busy():
            served.reset()
        served.answered(long, "Indeed.")
        served.rest()
        time.sleep(pause_s)
        start = time.perf_counter()
        with served.speculation.busy():
            waits.append(time.perf_counter() - start)
            assert is_in_step(served)
            assert served.n_tokens < whole  # it is not done
    assert sorted(waits)[len(waits) // 2] < 0.05
    wait_for(lambda: served.n_tokens > whole)  # and then it goes on
    with served.speculation.busy():
        assert is_in_step(served)


def test_another_prompt_ends_it(served: ServedLlama) -> None:
    served.answered(chat("Hello. " * 400), "Hi.")
    served.rest()
    text = served.create_completion("One two", max_tokens=4, temperature=0.0)
    n_tokens = served.n_tokens
    time.sleep(0.3)
    assert served.n_tokens == n_tokens
    assert is_in_step(served)
    assert text["choices"][0]["text"]


def test_what_a_template_refuses_is_left(served: ServedLlama) -> None:
    served._chat_by("{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}hello")
    with pytest.raises(TemplateError):
        served.chat_tokens({"messages": [*chat("a")["messages"]] * 2}, up_to="a")
    with pytest.raises(ValueError):
        served.chat_tokens(chat("a"), up_to=MESSAGE)  # the message is not written
    served.answered(chat("Hello."), "Hi.")
    served.rest()
    time.sleep(0.2)
    assert served.n_tokens == 0
    assert served.n_read_ahead == 0
