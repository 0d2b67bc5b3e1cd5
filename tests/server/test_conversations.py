"""Several conversations on one context: each goes on as if it were alone, and nearly as fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.llama import Llama
from swift_gguf.server.conversations import MIN_TOKENS, Conversations
from swift_gguf.tokens import common_prefix
from tests.server.conftest import Server

TOPICS = ("cats and how they sleep ", "the tax law of 1913 ", "birds that swim ")


def talk(server: Server, topics: tuple[str, ...], rounds: int = 3) -> dict[str, list[Any]]:
    """Texts and timings by topic, of conversations that take turns.

    They have no beginning in common: what is decoded in another batch may round differently.
    """
    prompts = {topic: topic * 20 for topic in topics}
    answers: dict[str, list[Any]] = {topic: [] for topic in topics}
    for _ in range(rounds):
        for topic in topics:
            body = {"prompt": prompts[topic], "max_tokens": 30, "seed": 5, "temperature": 0.7}
            status, answer = server.post("/v1/completions", body)
            assert status == 200, answer
            text = answer["choices"][0]["text"]
            answers[topic].append((text, answer["timings"]))
            prompts[topic] += text + "\nAnd?"
    return answers


def test_turns_change_no_text_and_decode_little(serve: Callable[..., Server], model: Path) -> None:
    alone: dict[str, list[tuple[str, Any]]] = {}
    for topic in TOPICS:
        server = serve(model, "-c", 2048, "-t", 1).wait_until_ready()
        alone |= talk(server, (topic,))
        server.close()
    together = talk(serve(model, "-c", 2048, "-t", 1).wait_until_ready(), TOPICS)
    for topic in TOPICS:
        assert [text for text, _ in together[topic]] == [text for text, _ in alone[topic]]
        # with what the same conversation decodes that has the server for itself
        for (_, here), (_, there) in zip(together[topic], alone[topic], strict=True):
            assert here["prompt_n"] <= there["prompt_n"] + 8
    kept_nothing = talk(
        serve(model, "-c", 2048, "-t", 1, "--cache-ram", 0).wait_until_ready(), TOPICS
    )
    assert kept_nothing[TOPICS[0]][1][1]["prompt_n"] > 2 * MIN_TOKENS  # the control


@pytest.fixture
def llama(model: Path) -> Iterator[Llama]:
    llama = Llama(
        str(model), n_ctx=1024, n_threads=1, speculation="off", flash_attn=None, verbose=False
    )
    yield llama
    llama.close()


def visit(conversations: Conversations, llama: Llama, prompt: list[int]) -> int:
    """As the server does; how many tokens the context held of the prompt."""
    conversations.enter(prompt)
    held = common_prefix(llama.input_ids[: llama.n_tokens].tolist(), prompt)
    next(iter(llama.generate(prompt, temp=0.0)))
    return held


def test_the_oldest_go_when_memory_is_full(llama: Llama) -> None:
    prompts = [[i + 1] * 200 for i in range(6)]
    unlimited = Conversations(llama, budget=1 << 40)
    for prompt in prompts:
        visit(unlimited, llama, prompt)
    assert len(unlimited) == 5
    size = unlimited.size / 5

    some = Conversations(llama, budget=int(2.5 * size))
    for prompt in prompts:
        visit(some, llama, prompt)
    assert len(some) == 2
    assert some.size <= 2.5 * size
    assert visit(some, llama, prompts[4]) == 200  # kept
    assert visit(some, llama, prompts[0]) == 0  # forgotten


def test_a_longer_state_takes_the_place_of_its_beginning(llama: Llama) -> None:
    conversations = Conversations(llama, budget=1 << 40)
    first, other = [5] * 200, [7] * 200
    visit(conversations, llama, first)
    visit(conversations, llama, other)
    assert visit(conversations, llama, [*first, *[6] * 100]) == 200
    visit(conversations, llama, other)
    assert len(conversations) == 1


def test_short_texts_are_not_worth_it(llama: Llama) -> None:
    conversations = Conversations(llama, budget=1 << 40)
    for token in range(1, 5):
        visit(conversations, llama, [token] * (MIN_TOKENS - 5))
    assert len(conversations) == 0


def test_a_short_prompt_leaves_a_long_conversation_as_it_is(llama: Llama) -> None:
    conversations = Conversations(llama, budget=1 << 40)
    long, other = [5] * 600, [7] * 200
    short = [*long[:150], *[6] * 20]
    visit(conversations, llama, long)
    visit(conversations, llama, other)
    assert visit(conversations, llama, short) == 150
    assert visit(conversations, llama, other) == 200
    assert visit(conversations, llama, long) == 600
    size = conversations.size
    for _ in range(3):  # nothing piles up
        for prompt in (short, other, long):
            assert visit(conversations, llama, prompt) >= len(prompt) - 20
    assert conversations.size <= 2 * size


def test_a_prompt_may_be_decoded_anew(serve: Callable[..., Server], model: Path) -> None:
    server = serve(model, "-c", 2048, "-t", 1).wait_until_ready()
    prompt = TOPICS[0] * 20
    body = {"prompt": prompt, "max_tokens": 30, "temperature": 0}

    def ask(**more: Any) -> Any:
        status, answer = server.post("/v1/completions", body | more)
        assert status == 200, answer
        return answer["choices"][0]["text"], answer["timings"]["cache_n"]

    fresh, _ = ask()
    assert ask()[1] > 0, "what is known is decoded again"
    ask(prompt=prompt + TOPICS[1] * 10)
    for _ in range(2):
        assert ask(cache_prompt=False) == (fresh, 0)
    assert ask(prompt=prompt + TOPICS[1] * 10)[1] > len(prompt) / 2, "a conversation is lost"
    assert server.post("/v1/completions", body | {"cache_prompt": 3})[0] == 400


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_models_with_a_running_state(
    serve: Callable[..., Server], tiny: Callable[..., Path], family: str
) -> None:
    """Always the text of a fresh start: shared beginnings, states put aside and brought back."""
    path = tiny(family, n_ctx=2048)
    server = serve(path, "-c", 1024, "-t", 1).wait_until_ready()
    a, b = TOPICS[0] * 20, TOPICS[1] * 20
    llama = Llama(str(path), n_ctx=1024, n_threads=1, flash_attn=None, verbose=False)
    options = {"max_tokens": 20, "temperature": 0.8, "seed": 3}
    for prompt in (a, b, a, a, a[:200], a + "And?", b, b + "x", a):
        status, answer = server.post("/v1/completions", {"prompt": prompt, **options})
        assert status == 200, answer
        llama.reset()
        expected = llama.create_completion(prompt, **options)["choices"][0]["text"]
        assert answer["choices"][0]["text"] == expected, prompt
    llama.close()


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_a_running_state_is_brought_back_to_be_gone_on_with(
    tiny: Callable[..., Path], family: str
) -> None:
    llama = Llama(str(tiny(family, n_ctx=2048)), n_ctx=1024, n_threads=1, verbose=False)
    conversations = Conversations(llama, budget=1 << 40)
    first, other = [5] * 200, [7] * 200
    visit(conversations, llama, first)
    visit(conversations, llama, other)
    assert visit(conversations, llama, [*first, 6]) == 200
    visit(conversations, llama, other)
    assert visit(conversations, llama, first[:150]) == 0, "it cannot be cut"
    llama.close()
