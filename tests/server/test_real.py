"""A real small model behind the server: the answers that it gives in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from swift_gguf.hub.models import resolve
from swift_gguf.llama import Llama
from tests.server.conftest import Server

openai = pytest.importorskip("openai", reason="the package openai is not installed")

MODEL = "smollm2-135m"
MESSAGES: Any = [{"role": "user", "content": "Name three colours, then say why the sky is blue."}]


@pytest.mark.slow
def test_the_same_answers_with_drafts_and_without(serve: Callable[..., Server]) -> None:
    options: Any = {"messages": MESSAGES, "max_tokens": 40, "seed": 11}
    with_drafts = serve(MODEL, "-c", 1024, "--speculation", "ngram,recycling,layer-skip")
    llama = Llama(
        str(resolve(MODEL)), n_ctx=1024, speculation="off", flash_attn=None, verbose=False
    )
    with_drafts.wait_until_ready()
    client = openai.OpenAI(base_url=f"{with_drafts.url}/v1", api_key="none")
    for temperature in (0.0, 0.8):
        expected = llama.create_chat_completion(temperature=temperature, **options)
        answer = client.chat.completions.create(model=MODEL, temperature=temperature, **options)
        text = expected["choices"][0]["message"]["content"]
        assert answer.choices[0].message.content == text
        assert answer.timings["draft_n"] > 0
        chunks = client.chat.completions.create(
            model=MODEL, temperature=temperature, stream=True, **options
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    llama.close()
    assert with_drafts.metric("llamacpp:n_drafted_total") > 0
    assert with_drafts.terminate() == 0


@pytest.mark.slow
def test_a_conversation_decodes_what_is_new(serve: Callable[..., Server]) -> None:
    server = serve(MODEL, "-c", 1024).wait_until_ready()
    messages = [{"role": "user", "content": "Tell me about the sea. " * 12}]
    sizes = []
    for _ in range(3):
        body = {"messages": messages, "max_tokens": 20, "temperature": 0}
        _, answer = server.post("/v1/chat/completions", body)
        sizes.append(answer["timings"]["prompt_n"])
        said = answer["choices"][0]["message"]["content"]
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on."}]
    assert sizes[0] > 60
    assert max(sizes[1:]) < 30
