"""Chat templates are programs by strangers: they end, stay small and get at nothing."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from swift_gguf.errors import TemplateError
from swift_gguf.model.model import Model
from swift_gguf.native.binding import library
from swift_gguf.templates.template import ChatTemplate
from swift_gguf.text.text import render_chat
from tests.fixtures.corrupt import with_chat_template
from tests.fixtures.tokenizer import CHATML

library()
from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # noqa: E402

_LAUGHS = "{% set a = ['ha', 'ha'] %}" + "{% set a = [a, a] %}" * 40

ENDLESS = {
    "range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "laughs": _LAUGHS + "{{ a | tojson }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}
HUGE = {
    "repeated": "{{ 'a' * 10 ** 10 }}",
    "centred": "{{ 'a' | center(10 ** 10) }}",
    "formatted": "{{ '%9999999999d' % 1 }}",
    "doubled": "{% set n = namespace(x='aa') %}{% for i in range(64) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "long": "{{ 'a' * 10 ** 7 }}",
    "written": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
}
REACHING = {
    "class": "{{ ''.__class__ }}",
    "class_of_messages": "{{ messages.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "through_a_filter": "{{ '' | attr('__class__') }}",
    "through_format": "{{ '{0.__class__}'.format(1) }}",
    "through_cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "changing": "{{ messages.append(1) }}",
    "file": "{% include '/etc/passwd' %}",
}
HOSTILE = ENDLESS | HUGE | REACHING

REAL = {
    "chatml": CHATML,
    "whitespace": "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.content | trim }}\n"
    "    {% endif %}\n{% endfor %}\n",
    "generation": "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ eos_token }}",
    "loop_controls": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}"
    "{{ bos_token + m['content'] }}{% endfor %}",
    "tools": "{% for t in tools or [] %}{{ t | tojson(indent=2) }}{% endfor %}"
    "{{ messages|length }}",
    "undefined": "{{ enable_thinking is defined }}{{ messages[0].reasoning }}",
    "day": "{{ strftime_now('%Y-%m-%d') }}",
}
MESSAGES = [
    {"role": "system", "content": "  <b>ä\udce4</b>\n"},
    {"role": "user", "content": "'Hello' \"🦙\""},
]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_template_may_not_is_refused_in_one_line(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateError) as refused:
        ChatTemplate(HOSTILE[name]).render(messages=[])
    assert len(str(refused.value).splitlines()) == 1
    assert time.monotonic() - start < 60


def test_a_template_goes_on_after_one_rendering_was_ended() -> None:
    template = ChatTemplate(
        "{% if messages %}" + ENDLESS["loops"] + "{% endif %}{{ 'all is well' }}"
    )
    assert template.render(messages=[]) == "all is well"
    with pytest.raises(TemplateError, match="too long"):
        template.render(messages=MESSAGES)
    assert template.render(messages=[]) == "all is well"


@pytest.mark.parametrize("name", REAL)
def test_templates_render_as_llama_cpp_renders_them(name: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"ü": [1, 2.5, None]}}}]
    theirs = Jinja2ChatFormatter(REAL[name], eos_token="</s>", bos_token="<s>")
    ours = ChatTemplate(REAL[name], eos_token="</s>", bos_token="<s>")
    assert (
        ours.render(messages=MESSAGES, tools=tools) == theirs(messages=MESSAGES, tools=tools).prompt
    )


def test_what_a_template_says_of_the_messages_is_told() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TemplateError, match="roles must alternate"):
        template.render(messages=MESSAGES)


def test_several_threads_get_their_own_answers() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    answers: dict[int, set[str]] = {}

    def ask(i: int) -> None:
        answers[i] = {template.render(messages=[{"content": i}]) for _ in range(50)}

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: {str(i)} for i in range(8)}


def test_an_application_that_carries_its_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its executable starts no Python: the sandbox is all there is, and no process begins."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert ChatTemplate("{{ messages[0].content }}").render(messages=MESSAGES[1:]).endswith('"🦙"')
    with pytest.raises(TemplateError, match="__class__"):
        ChatTemplate(REACHING["class"]).render(messages=[])


def test_close_ends_the_process() -> None:
    template = ChatTemplate("x")
    template.render()
    process = template._process._process
    assert process is not None
    template.close()
    assert process.poll() is not None
    assert template.render() == "x"


@pytest.fixture(scope="module")
def hostile_model(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in whose file there is a template that repeats a text without end."""
    path = tmp_path_factory.mktemp("hostile") / "model.gguf"
    path.write_bytes(with_chat_template(tiny("llama").read_bytes(), HUGE["repeated"]))
    return path


def test_generate_and_chat(hostile_model: Path, open_model: Callable[..., Model]) -> None:
    model = open_model(hostile_model)
    with pytest.raises(TemplateError, match="MB; try --raw or --chat-template"):
        render_chat(model, [{"role": "user", "content": "hello"}])


def test_swift_llama_and_the_server(hostile_model: Path) -> None:
    from swift_gguf import Llama

    llama = Llama(str(hostile_model), n_threads=1, n_gpu_layers=0, verbose=False)
    with pytest.raises(TemplateError, match="MB"):
        llama.create_chat_completion([{"role": "user", "content": "hello"}])
    answer = llama.create_completion("hello", max_tokens=4)  # what needs no template works
    assert answer["usage"]["completion_tokens"] > 0
    json.dumps(answer)
    llama.close()
