"""LangChain on our `Llama`: the same answers as on its own, and drafts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from swift_gguf.llama import Llama
from tests.llama.conftest import PlainLlama

import llama_cpp  # isort: skip

chat_models = pytest.importorskip("langchain_community.chat_models")
llms = pytest.importorskip("langchain_community.llms")
from langchain_core.output_parsers import StrOutputParser  # noqa: E402
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate  # noqa: E402

QUESTION = "the cat and the dog and the cat and the dog and the"


@pytest.fixture
def make(tiny_path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made = []

    def make_(kind: Any, llama: type, **values: Any) -> Any:
        options: dict[str, Any] = {}
        if llama is Llama:
            options = {"speculation": "ngram,recycling"}
        monkeypatch.setattr(llama_cpp, "Llama", llama)
        values = {"n_ctx": 512, "seed": 5, "max_tokens": 40, "verbose": False} | values
        made.append(kind(model_path=tiny_path, n_batch=512, model_kwargs=options, **values))
        assert type(made[-1].client) is llama
        return made[-1]

    yield make_
    for model in made:
        model.client.close()


def test_a_chain_of_chat(make: Any) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{question}")])
    answers = []
    for llama in (PlainLlama, Llama):
        model = make(chat_models.ChatLlamaCpp, llama)
        chain = prompt | model | StrOutputParser()
        whole = chain.invoke({"question": QUESTION})
        streamed = list(filter(None, chain.stream({"question": QUESTION})))
        assert len(streamed) > 1
        both = chain.batch([{"question": QUESTION}, {"question": "no"}], {"max_concurrency": 1})
        answers.append((whole, streamed, both))
    assert answers[0] == answers[1]
    assert model.client.speculation.stats.drafted > 0


def test_a_chain_of_text(make: Any) -> None:
    prompt = PromptTemplate.from_template("{a} and {a} and")
    answers = []
    for llama in (PlainLlama, Llama):
        chain = prompt | make(llms.LlamaCpp, llama, stop=["zzz"])
        answers.append((chain.invoke({"a": QUESTION}), list(chain.stream({"a": QUESTION}))))
    assert answers[0] == answers[1]
