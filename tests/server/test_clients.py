"""The server as people's programs use it: openai, instructor, LangChain and llm, as they are.

The model was generated: a schema holds it to its form, and what it says in it means nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.fixtures.tokenizer import THINKING
from tests.server.conftest import Server

openai, instructor, langchain_openai = (
    pytest.importorskip(name, reason=f"the package {name} is not installed")
    for name in ("openai", "instructor", "langchain_openai")
)

MODEL = "tiny"
ASKED: Any = [{"role": "user", "content": "Plan a trip to Ulm and Bonn, three days in all."}]
GREEDY: Any = {"temperature": 0, "max_tokens": 400}


class Weather(Enum):
    SUN = "sun"
    RAIN = "rain"


class Stop(BaseModel):
    """A place, and how long one stays there."""

    city: Literal["Ulm", "Bonn", "Köln"]
    days: Annotated[int, Field(ge=1, le=9)]
    weather: Weather


class Trip(BaseModel):
    """A trip by train."""

    title: Annotated[str, Field(max_length=20)]
    stops: Annotated[list[Stop], Field(min_length=1, max_length=2)]
    by_night: bool | None


class Leg(BaseModel):
    city: Literal["Ulm", "Bonn"]
    days: Annotated[int, Field(ge=1, le=9)]


class Note(BaseModel):
    text: str


class Anything(BaseModel):
    model_config = ConfigDict(extra="allow")


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


# -- openai ----------------------------------------------------------------------------------------


def test_parse(client: Any) -> None:
    found = client.chat.completions.parse(
        model=MODEL, messages=ASKED, response_format=Trip, **GREEDY
    )
    assert isinstance(found.choices[0].message.parsed, Trip)


def test_parsed_calls(client: Any) -> None:
    found = client.chat.completions.parse(
        model=MODEL, messages=ASKED, tools=[openai.pydantic_function_tool(Trip)],
        tool_choice="required", **GREEDY,
    )  # fmt: skip
    (call,) = found.choices[0].message.tool_calls
    assert call.function.name == "Trip"
    assert isinstance(call.function.parsed_arguments, Trip)


def test_streamed_calls_with_usage(client: Any) -> None:
    options = {
        "model": MODEL,
        "messages": ASKED,
        "tools": [openai.pydantic_function_tool(Stop)],
        "tool_choice": {"type": "function", "function": {"name": "Stop"}},
        **GREEDY,
    }
    with client.chat.completions.stream(
        **options, stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type for event in stream}
        found = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    (call,) = found.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Stop)
    assert found.usage.completion_tokens > 5
    whole = client.chat.completions.create(**options)
    (same,) = whole.choices[0].message.tool_calls
    assert same.function.arguments == call.function.arguments
    assert whole.usage.completion_tokens == found.usage.completion_tokens


def test_a_history_with_calls(client: Any) -> None:
    """As the client gives it back, extra fields and all."""
    first = client.chat.completions.create(
        model=MODEL, messages=ASKED, tools=[openai.pydantic_function_tool(Stop)],
        tool_choice="required", **GREEDY,
    )  # fmt: skip
    message = first.choices[0].message
    turns = [
        *ASKED,
        message,
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "booked"},
    ]
    after = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=8)
    assert after.choices[0].message.content
    dumped = [*ASKED, message.model_dump(), turns[-1]]  # nulls, too
    assert client.chat.completions.create(model=MODEL, messages=dumped, max_tokens=1)


def test_what_only_extra_body_says(serve: Callable[..., Server], tiny: Callable[..., Path]) -> None:
    path = tiny("llama", n_ctx=512, quant="Q8_0", template=THINKING)
    server = serve(path, "-c", 512, "-t", 1).wait_until_ready()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def prompt(**options: Any) -> int:
        answer = client.chat.completions.create(
            model=MODEL, messages=ASKED, max_tokens=1, **options
        )
        return int(answer.usage.prompt_tokens)

    told = {"chat_template_kwargs": {"enable_thinking": False}}
    quick = prompt(extra_body=told)
    assert quick > prompt()
    assert prompt(reasoning_effort="none") == quick
    assert prompt(reasoning_effort="low") > prompt()
    with pytest.raises(openai.BadRequestError) as refused:
        prompt(extra_body={"chat_template_kwargs": {"messages": []}})
    assert refused.value.param == "chat_template_kwargs"
    with pytest.raises(openai.BadRequestError) as refused:
        prompt(modalities=["text", "audio"])
    assert refused.value.param == "modalities"


# -- instructor ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(client: Any, mode: str) -> None:
    """Nested models, at once: nothing is asked again."""
    asked = instructor.from_openai(client, mode=getattr(instructor.Mode, mode))
    found = asked.chat.completions.create(
        model=MODEL, messages=ASKED, response_model=Trip, max_retries=0, **GREEDY
    )
    assert isinstance(found, Trip)


def test_instructor_without_a_form(client: Any) -> None:
    """JSON and MD_JSON describe it to the model, and nothing holds it: what comes is read."""
    said = '{"city": "Ulm", "days": 2, "weather": "sun"}'
    asked = instructor.from_openai(client, mode=instructor.Mode.JSON)
    options = {"model": MODEL, "messages": ASKED, "max_retries": 0, **GREEDY}
    assert isinstance(asked.chat.completions.create(**options, response_model=Anything), Anything)
    asked = instructor.from_openai(client, mode=instructor.Mode.MD_JSON)
    form = f"root ::= {json.dumps(f'```json{chr(10)}{said}{chr(10)}```')}"
    found = asked.chat.completions.create(
        **options, response_model=Stop, extra_body={"grammar": form}
    )
    assert found.model_dump() == Stop.model_validate_json(said).model_dump()


def test_instructor_s_parallel_calls(client: Any) -> None:
    """Which the model may make as it likes; a grammar makes this one do it."""
    call = '<tool_call>{"name": "Note", "arguments": {"text": "x"}}</tool_call>'
    asked = instructor.from_openai(client, mode=instructor.Mode.PARALLEL_TOOLS)
    found = asked.chat.completions.create(
        model=MODEL, messages=ASKED, response_model=Iterable[Note], max_retries=0, **GREEDY,
        extra_body={"grammar": f"root ::= {json.dumps(call * 2)}"},
    )  # fmt: skip
    assert list(found) == [Note(text="x")] * 2


def test_instructor_streams_what_is_there_so_far(client: Any) -> None:
    asked = instructor.from_openai(client)
    parts = list(
        asked.chat.completions.create_partial(
            model=MODEL, messages=ASKED, response_model=Leg, max_retries=0, **GREEDY
        )
    )
    assert Leg.model_validate(parts[-1].model_dump())


# -- LangChain -------------------------------------------------------------------------------------


@pytest.fixture
def chat(server: Server) -> Any:
    return langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=400,
        max_retries=0, stream_usage=True,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_s_structured_output(chat: Any, method: str) -> None:
    found = chat.with_structured_output(Trip, method=method).invoke(ASKED)
    assert isinstance(found, Trip)


def test_langchain_s_tools(chat: Any) -> None:
    bound = chat.bind_tools([Stop], tool_choice="any")
    answer = bound.invoke(ASKED)
    (call,) = answer.tool_calls
    assert Stop.model_validate(call["args"])
    chunks = list(bound.stream(ASKED))
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined += chunk
    assert joined.tool_calls[0]["args"] == call["args"]
    assert joined.usage_metadata["output_tokens"] == answer.usage_metadata["output_tokens"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "booked"}
    after = chat.invoke([*ASKED, answer, result], max_tokens=8)
    assert after.content


def test_langchain_streams(chat: Any) -> None:
    whole = chat.invoke(ASKED, max_tokens=20)
    assert "".join(chunk.content for chunk in chat.stream(ASKED, max_tokens=20)) == whole.content


# -- llm -------------------------------------------------------------------------------------------


def test_llm_s_own_client(server: Server, tmp_path: Path) -> None:
    """llm's models with OpenAI's API: a text, a stream, a schema."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: served\n  model_name: {MODEL}\n  api_base: {server.url}/v1\n"
        "  supports_schema: true\n  supports_tools: true\n"
    )

    def ask(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", "-m", "served", *arguments]
        environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=environment,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    options = ("-o", "temperature", "0", "-o", "max_tokens", "200")
    text = ask("Why is the sky blue?", "--no-stream", *options)
    assert text == ask("Why is the sky blue?", *options)
    schema = json.dumps(Leg.model_json_schema())
    options = ("-o", "temperature", "0", "-o", "max_tokens", "1000")  # it likes blanks
    assert Leg.model_validate_json(ask("A trip", "--schema", schema, *options))
