"""`Llama` under schemas: answers fit, drafts change nothing, errors name the keyword."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swift_gguf.drafting.verification import Walk
from swift_gguf.errors import GrammarError, SchemaError
from swift_gguf.llama import Llama
from swift_gguf.schemas.constraint import json_by
from tests.llama.conftest import without_ids
from tests.real.conftest import real as real

from llama_cpp import LogitsProcessorList  # isort: skip

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "words": {"type": "array", "items": {"$ref": "#/$defs/word"}, "minItems": 2, "maxItems": 4},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "words", "age"],
    "$defs": {"word": {"enum": ["red", "green", 'say "hi"', "\n", None]}},
}
SET = {"properties": {"tags": {"type": "array", "uniqueItems": True}}}
ASK = [{"role": "user", "content": "Say red, green, red, green, red, green and your age."}]
FORM = {"type": "json_object", "schema": SCHEMA}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seed": {"seed": 7},
    "hot": {"seed": 8, "temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "penalties": {"seed": 1, "repeat_penalty": 1.3, "frequency_penalty": 0.2},
    "mirostat": {"seed": 2, "mirostat_mode": 2},
}


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def judged(text: str) -> Any:
    found = json.loads(text)
    assert found.keys() == {"name", "words", "age"}
    assert len(found["name"]) <= 12
    assert 2 <= len(found["words"]) <= 4
    assert set(found["words"]) <= {"red", "green", 'say "hi"', "\n", None}
    assert 1 <= found["age"] <= 99
    return found


def both(llama: Llama, *, max_tokens: int = 150, **asked: Any) -> list[Any]:
    """The answer without drafts, and with them in every cycle."""
    drafting, answers = llama.speculation.mode, []
    try:
        for mode in ("off", drafting):
            llama.speculation.mode = mode
            llama.reset()
            answer = llama.create_chat_completion(ASK, max_tokens=max_tokens, **asked)
            answers.append(without_ids(answer))
    finally:
        llama.speculation.mode = drafting
    return answers


@pytest.mark.parametrize("name", SAMPLING)
def test_drafts_change_nothing(swift: Llama, name: str) -> None:
    plain, drafted = both(swift, response_format=FORM, **SAMPLING[name])
    assert drafted == plain
    assert swift.speculation.stats.drafted > 0
    if drafted["choices"][0]["finish_reason"] == "stop":
        judged(drafted["choices"][0]["message"]["content"])


def accept_all(self: Walk, token: int) -> None:
    """Takes the first drafted child, whatever was sampled."""
    children = self._tree.children(self.node)
    took(self, self._tree.tokens[children[0]] if children else token)


took = Walk.take


def test_the_control_fails(swift: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts that are taken unseen change the answer, or are no answer: the test above can fail."""
    monkeypatch.setattr(Walk, "take", accept_all)
    with pytest.raises((AssertionError, GrammarError)):
        test_drafts_change_nothing(swift, "greedy")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "form", [FORM, {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}], ids=str
)
def test_forms(swift: Llama, form: Any, stream: bool) -> None:
    answer = swift.create_chat_completion(
        ASK, response_format=form, seed=3, max_tokens=400, stream=stream
    )
    if stream:
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in answer)
    else:
        text = answer["choices"][0]["message"]["content"]
    judged(text)


def test_any_object(swift: Llama) -> None:
    form = {"type": "json_object"}
    answer = swift.create_chat_completion(ASK, response_format=form, seed=3, max_tokens=20)
    assert answer["choices"][0]["message"]["content"].startswith("{")


def test_as_a_grammar(swift: Llama) -> None:
    """With biases, which cannot bring back what does not fit, and penalties."""
    answer = swift.create_completion(
        "red green", grammar=json_by(SCHEMA), seed=3, max_tokens=400, logit_bias={5: 50.0}
    )
    judged(answer["choices"][0]["text"])


def test_a_logits_processor_that_forces_what_does_not_fit(swift: Llama) -> None:
    def forces(_: Any, scores: Any) -> Any:
        scores[:] = 0
        return scores

    form, processors = json_by({"const": 1}), LogitsProcessorList([forces])
    with pytest.raises(GrammarError, match="does not fit"):
        swift.create_completion("x", grammar=form, logits_processor=processors, seed=1)
    assert swift.create_completion("x", max_tokens=3)["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("chat_format", [None, "chatml", "chatml-function-calling"])
def test_a_named_tool(
    swift: Llama, monkeypatch: pytest.MonkeyPatch, chat_format: str | None
) -> None:
    if chat_format:
        monkeypatch.setattr(swift, "chat_format", chat_format)
    parameters = {"properties": {"to": {"$ref": "#/$defs/P"}}, "required": ["to"]}
    tools = [
        tool("other", SET),
        tool("f", {**parameters, "$defs": {"P": {"enum": ["x", 'y"']}}}),
    ]
    asked: dict[str, Any] = {"tools": tools, "seed": 2, "max_tokens": 60}
    answer = swift.create_chat_completion(
        [{"role": "user", "content": "sit"}], tool_choice=named("f"), **asked
    )
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["to"] in ("x", 'y"')
    with pytest.raises(
        SchemaError, match=r"^other: properties\.tags: uniqueItems is not supported"
    ):
        swift.create_chat_completion(ASK, tool_choice=named("other"), **asked)
    functions = [each["function"] for each in tools]
    with pytest.raises(
        SchemaError, match=r"^other: properties\.tags: uniqueItems is not supported"
    ):
        swift.create_chat_completion(ASK, functions=functions, function_call={"name": "other"})


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "json_object", "schema": SET}, "properties.tags: uniqueItems is not supported"),
        ({"type": "json_object", "schema": {"pattern": "a]("}}, "pattern is not supported"),
        ({"type": "json_schema"}, "needs a schema"),
        ({"type": "json_object", "schema": False}, "allows no value"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_told(swift: Llama, form: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        swift.create_chat_completion(ASK, response_format=form)


@pytest.mark.slow
def test_a_real_model(real: Callable[..., Path], open_llama: Callable[..., Any]) -> None:
    llama = open_llama(Llama, str(real("smollm2-135m")), n_ctx=1024, n_threads=2)
    accepted = 0
    for name in ("greedy", "hot"):
        plain, drafted = both(llama, response_format=FORM, max_tokens=60, **SAMPLING[name])
        assert drafted == plain
        accepted += llama.speculation.stats.accepted
        if drafted["choices"][0]["finish_reason"] == "stop":
            judged(drafted["choices"][0]["message"]["content"])
    assert accepted > 5
