"""How a chat template is asked: its variables, and answers that go on."""

from __future__ import annotations

from typing import Any

import pytest

from swift_gguf.errors import TemplateError
from swift_gguf.templates.template import ChatTemplate, Prompting, parse_variables, with_reasoning
from tests.fixtures.tokenizer import CHATML, THINKING

QUESTION = {"role": "user", "content": "Why?"}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def rendered(*messages: Any, template: str = THINKING, **prompting: Any) -> str:
    return ChatTemplate(template).render(messages, Prompting(**prompting))


def test_a_template_reads_its_variables() -> None:
    plain = rendered(QUESTION)
    assert plain.endswith("<|im_start|>assistant\n")
    quick = rendered(QUESTION, variables=with_reasoning({}, thinks=False))
    assert quick == plain + "<think>\n\n</think>\n\n"
    assert rendered(QUESTION, variables={"enable_thinking": True}) == plain
    low = rendered(QUESTION, variables=with_reasoning({}, effort="low"))
    assert low == "<|im_start|>system\nReasoning: low<|im_end|>\n" + plain
    assert rendered(QUESTION, variables={"unknown": [1]}) == plain


def test_whether_and_how_hard_a_model_thinks() -> None:
    assert with_reasoning({}) == {}
    started = {"enable_thinking": True, "reasoning_effort": "high", "style": "dry"}
    assert with_reasoning(started) == started
    off = {"enable_thinking": False, "thinking": False, "style": "dry"}
    assert with_reasoning(started, effort="none") == off
    assert with_reasoning({}, thinks=True, effort="none")["enable_thinking"] is True
    assert with_reasoning(started, effort="low")["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token"]
)
def test_what_makes_the_prompt_is_not_to_be_set(name: str) -> None:
    with pytest.raises(TemplateError, match=f"'{name}' cannot be set"):
        Prompting(variables={name: []})


def test_variables_in_text() -> None:
    assert parse_variables('{"enable_thinking": false, "n": 1}') == {
        "enable_thinking": False,
        "n": 1,
    }
    for text in ("", "[]", "enable_thinking=false", '{"a": ', "[" * 99999):
        with pytest.raises(TemplateError, match="is not a JSON object"):
            parse_variables(text)
    for text in ('{"messages": []}', '{"enable_thinking": "false"}'):
        with pytest.raises(TemplateError):
            parse_variables(text)


@pytest.mark.parametrize("template", [CHATML, THINKING])
@pytest.mark.parametrize("text", ["Because", "Because it is ", " a\n\n", "{{ x }} é 🙂", ""])
def test_an_answer_goes_on(template: str, text: str) -> None:
    prompt = rendered(QUESTION, answer(text), template=template, continues="content")
    assert prompt == rendered(QUESTION, template=template) + text
    parts = [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]
    assert rendered(QUESTION, answer(parts), template=template, continues="content") == prompt


def test_an_answer_goes_on_as_the_template_shows_answers() -> None:
    """With the thoughts before it, and among them."""
    thought = answer("Because", reasoning_content="Hm, well")
    prompt = rendered(QUESTION, thought, continues="content")
    assert prompt == rendered(QUESTION) + "<think>\nHm, well\n</think>\n\nBecause"
    thinking = answer("", reasoning_content="Hm, well")
    prompt = rendered(QUESTION, thinking, continues="reasoning_content")
    assert prompt == rendered(QUESTION) + "<think>\nHm, well"


def test_what_cannot_go_on() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for last in (QUESTION, answer("I look", tool_calls=[call])):
        with pytest.raises(TemplateError, match="only an assistant's message without tool calls"):
            rendered(last, continues="content")
    with pytest.raises(TemplateError, match="only an assistant's"):
        rendered(continues="content")
    with pytest.raises(TemplateError, match="does not show the reasoning_content"):
        rendered(answer("", reasoning_content="Hm"), template=CHATML, continues="reasoning_content")
    twice = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
    with pytest.raises(TemplateError, match="does not show the content"):
        rendered(answer("Hm"), template=twice, continues="content")


def test_a_prompt_may_end_with_the_last_message() -> None:
    whole = rendered(QUESTION, answer("Because."), opens_answer=False)
    assert whole == rendered(QUESTION) + "Because.<|im_end|>\n"
