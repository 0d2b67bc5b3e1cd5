"""The request of POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from swift_gguf.server.options import MAX_MESSAGES, MAX_TOOLS, MAX_TOP_LOGPROBS
from swift_gguf.server.requests import (
    Body,
    Function,
    FunctionName,
    Json,
    Message,
    Name,
    ResponseFormat,
    Sampling,
    TokenLimit,
    Tool,
    ToolChoice,
    lesser,
    names,
)
from swift_gguf.templates import Continued, Prompting, check_variables, with_reasoning


def _object(value: Any) -> Any:
    """An object, which some clients send as a JSON text."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("must be an object, or the JSON text of an object") from None
    return value


def _variables(value: dict[str, Any]) -> dict[str, Any]:
    check_variables(value)
    return value


Variables = Annotated[Json, BeforeValidator(_object), AfterValidator(_variables)]
"""Variables of a chat template."""


class Thinking(Body):
    """The field of DeepSeek's, GLM's and Kimi's APIs.  A token budget is not supported."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["enabled", "disabled", "auto", "adaptive"]

    @property
    def wanted(self) -> bool | None:
        """None: the template's default."""
        return {"enabled": True, "disabled": False}.get(self.type)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: TokenLimit = Field(default=None, validation_alias=names("max_tokens", "n_predict"))
    max_completion_tokens: TokenLimit = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True
    functions: Annotated[list[Function], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    """The old form of `tools`.  The answer then has a `function_call`."""
    function_call: Literal["none", "auto"] | FunctionName | None = None
    chat_template_kwargs: Variables = Field(default_factory=dict)
    enable_thinking: bool | None = None
    thinking: Thinking | None = None
    reasoning_effort: Name | None = None
    reasoning_format: Literal["none", "auto", "deepseek"] = "auto"
    """none: the reasoning stays in the content, as the model writes it."""
    continue_final_message: bool | Continued | None = None
    """None: continue the last message if it is an answer without calls, as llama-server does."""
    add_generation_prompt: bool | None = None
    echo: bool = False
    """True: the answer begins with the text that it continues."""

    @field_validator("add_generation_prompt")
    @classmethod
    def _new_or_old(cls, wanted: bool | None, info: ValidationInfo) -> bool | None:
        if wanted and info.data.get("continue_final_message"):
            raise ValueError("cannot be combined with continue_final_message")
        return wanted

    @field_validator("functions")
    @classmethod
    def _either(cls, functions: list[Function] | None, info: ValidationInfo) -> Any:
        if functions is not None and info.data.get("tools") is not None:
            raise ValueError("give tools or functions, not both")
        return functions

    @property
    def is_legacy(self) -> bool:
        """True if the request has `functions` instead of `tools`."""
        return self.functions is not None

    @property
    def choice(self) -> Literal["none", "auto", "required"] | ToolChoice | None:
        """`tool_choice`, or the old `function_call`."""
        if isinstance(self.function_call, FunctionName):
            return ToolChoice(function=self.function_call)
        return self.function_call if self.is_legacy else self.tool_choice

    @property
    def offered(self) -> list[Tool]:
        """The tools that may be called."""
        if self.choice == "none":
            return []
        return [Tool(function=one) for one in self.functions or ()] or self.tools or []

    @property
    def must_call(self) -> bool:
        """True if the answer must be a call."""
        return bool(self.offered) and self.choice not in (None, "auto")

    @property
    def calls_once(self) -> bool:
        """True if the answer may have at most one call."""
        return self.is_legacy or not self.parallel_tool_calls

    @property
    def continued(self) -> Continued | None:
        """The part of the last message that the answer continues, if there is one."""
        last, wanted = self.messages[-1], self.continue_final_message
        if isinstance(wanted, str):
            return wanted
        if wanted is None:
            is_new = self.add_generation_prompt or last.calls
            wanted = last.role == "assistant" and not is_new and bool(last.content or last.thought)
        if not wanted:
            return None
        return "reasoning_content" if last.thought and not last.content else "content"

    @property
    def prompted(self) -> list[Message]:
        """The messages of the prompt.  An empty answer at the end is dropped, unless the request
        says that it is to be continued."""
        last = self.messages[-1]
        is_blank = last.role == "assistant" and not (last.content or last.thought or last.calls)
        begins = is_blank and self.continued is None and self.add_generation_prompt is not False
        return self.messages[:-1] if begins and len(self.messages) > 1 else self.messages

    @property
    def prefix(self) -> str:
        """The text that the answer continues."""
        last = self.messages[-1]
        if self.continued is None:
            return ""
        return last.thought if self.continued == "reasoning_content" else last.text

    def prompting(self, defaults: Mapping[str, Any]) -> Prompting:
        """How the template renders the prompt.

        defaults: the template variables that the server was started with.
        """
        thinks = self.enable_thinking
        if thinks is None and self.thinking is not None:
            thinks = self.thinking.wanted
        told = with_reasoning(defaults, thinks=thinks, effort=self.reasoning_effort)
        return Prompting(
            variables=told | self.chat_template_kwargs,
            opens_answer=self.add_generation_prompt is not False,
            continues=self.continued,
        )

    def limit(self, n_predict: int | None) -> int | None:
        """The limit of tokens for each choice."""
        asked = self.max_completion_tokens
        return lesser(self.max_tokens if asked is None else asked, n_predict)
