"""OpenAI's requests with limits, and their conversion to arguments of `llama_cpp.Llama`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from swift_gguf.sampling import SamplingOptions
from swift_gguf.server.fields import refuse_unheld
from swift_gguf.server.options import (
    MAX_BIASES,
    MAX_CHOICES,
    MAX_CONTENT_LENGTH,
    MAX_DEPTH,
    MAX_GRAMMAR_LENGTH,
    MAX_INPUTS,
    MAX_NAME_LENGTH,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TEXTS,
    MAX_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
)

SAMPLED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Fields whose defaults are the server's `SamplingOptions`."""


def _plain_json(value: Any) -> Any:
    """Refuses lone surrogates, numbers that are not finite, and values that are nested too deep."""

    def depth(item: Any, left: int) -> None:
        if left == 0:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        for child in item.values() if isinstance(item, dict) else item:
            if isinstance(child, (dict, list)):
                depth(child, left - 1)

    if isinstance(value, (dict, list)):
        depth(value, MAX_DEPTH)
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate is not a character") from None
    return value


def _no_null(text: str) -> str:
    if "\0" in text:
        raise ValueError("a null character is not allowed here")
    return text


Name = Annotated[str, StringConstraints(max_length=MAX_NAME_LENGTH)]
Json = Annotated[dict[str, Any], AfterValidator(_plain_json)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]
Grammar = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_GRAMMAR_LENGTH), AfterValidator(_no_null)
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
# `fail_fast`, because pydantic would list every bad item of a million
Prompts = (
    str
    | TokenIds
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
    | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
)
Texts = (
    str
    | TokenIds
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_TEXTS)]
    | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_TEXTS)]
)


TEXT_PARTS = ("text", "refusal")
"""Types of a message's parts that have text."""


class Body(BaseModel):
    """JSON from a client.  A field that is null counts as missing, as in OpenAI's API."""

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class Message(Body):
    """A message of a conversation.  Other fields are passed on to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None

    @field_validator("content")
    @classmethod
    def _only_text(cls, content: str | list[dict[str, Any]] | None) -> str | None:
        if not isinstance(content, list):
            return content
        # a part's text has the name of its type
        texts = [part.get(part["type"]) for part in content if part.get("type") in TEXT_PARTS]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise ValueError("only text parts are supported, not images or audio")
        return "".join(map(str, texts))

    @model_validator(mode="after")
    def _is_plain(self) -> Message:
        more = self.model_extra or {}
        _plain_json(more)
        _check_calls("tool_calls", more.get("tool_calls"))
        if "function_call" in more:
            _check_calls("function_call", [{"function": more["function_call"]}])
        return self

    def as_dict(self, *, calls_as_text: bool = False) -> dict[str, Any]:
        """The message for a template.  Its role becomes one that templates know.

        calls_as_text: the template expects the arguments of calls as text.
        """
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        more = dict(self.model_extra or {})
        if "function_call" in more:  # the old form of tool calls
            more["tool_calls"] = [{"type": "function", "function": more.pop("function_call")}]
        if isinstance(calls := more.get("tool_calls"), list):
            more["tool_calls"] = [_called(call, as_text=calls_as_text) for call in calls]
        return {**more, "role": role, "content": self.content or ""}

    @property
    def text(self) -> str:
        """The message's text."""
        return self.content if isinstance(self.content, str) else ""

    @property
    def thought(self) -> str:
        """The reasoning of an answer."""
        thought = (self.model_extra or {}).get("reasoning_content")
        return thought if isinstance(thought, str) else ""

    @property
    def calls(self) -> bool:
        """True if it is an answer with tool calls."""
        more = self.model_extra or {}
        return bool(more.get("tool_calls") or more.get("function_call"))


def _called(call: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    """A call of an earlier answer.  Clients send its arguments as text, but most templates expect
    an object."""
    arguments = call["function"]["arguments"]
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        arguments = "{}"  # clients write this for no arguments
    if isinstance(arguments, str) and not as_text:
        try:
            read = _plain_json(json.loads(arguments))
        except (ValueError, RecursionError):
            read = None
        arguments = read if isinstance(read, dict) else arguments
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _check_calls(field: str, calls: Any) -> None:
    """Refuses a malformed call, because a template's error would not say where it is."""
    if calls is not None and not isinstance(calls, list):
        raise ValueError(f"{field} is not a list")
    for call in calls or ():
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise ValueError(f"a call in {field} has no function")
        for name in ("name", "arguments"):
            if name not in function:
                raise ValueError(f"a call in {field} has no {name}")
        if not isinstance(function["name"], str):
            raise ValueError(f"the name of a call in {field} is not a string")


class StreamOptions(Body):
    include_usage: bool = False


def names(*names: str) -> AliasChoices:
    """The names of a field, which differ between servers."""
    return AliasChoices(*names)


class Sampling(Body):
    """Fields that completions and chat completions share.  For other fields see `fields`."""

    model: Name | None = None
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    """-1 or 0: all tokens."""
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    typical_p: float | None = Field(
        default=None, gt=0, le=1, allow_inf_nan=False, validation_alias=names("typical_p", "typ_p")
    )
    repeat_penalty: float | None = Field(
        default=None,
        gt=0,
        le=10,
        allow_inf_nan=False,
        validation_alias=names("repeat_penalty", "repetition_penalty"),
    )
    repeat_last_n: int | None = Field(default=None, ge=-1, lt=2**31)
    """The number of latest tokens that are penalised; -1: all."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    mirostat: Literal[0, 1, 2] = 0
    mirostat_tau: float = Field(default=5.0, gt=0, le=100, allow_inf_nan=False)
    mirostat_eta: float = Field(default=0.1, gt=0, le=10, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    """-1: a random seed."""
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    grammar: Grammar | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    cache_prompt: bool | None = None
    """False: process the whole prompt, without the KV cache.  From llama-server."""

    @model_validator(mode="before")
    @classmethod
    def _held(cls, given: Any) -> Any:
        if isinstance(given, dict):
            refuse_unheld(given)
        return given

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _of_tokens(cls, bias: Any) -> Any:
        if isinstance(bias, dict):
            if len(bias) > MAX_BIASES:
                raise ValueError(f"more than {MAX_BIASES} tokens")
            if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in bias):
                raise ValueError("its keys must be token ids")
        return bias

    @property
    def wants_usage(self) -> bool:
        """True if a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, defaults: SamplingOptions) -> dict[str, Any]:
        """Arguments of `create_completion` and `create_chat_completion`."""
        wanted: dict[str, Any] = {
            name: getattr(defaults, name) if getattr(self, name) is None else getattr(self, name)
            for name in SAMPLED
        }
        if self.typical_p is not None:
            wanted["typical_p"] = self.typical_p
        if self.mirostat:
            wanted |= {
                "mirostat_mode": self.mirostat,
                "mirostat_tau": self.mirostat_tau,
                "mirostat_eta": self.mirostat_eta,
            }
        if self.stop is not None:
            wanted["stop"] = [self.stop] if isinstance(self.stop, str) else list(self.stop)
        if self.logit_bias:
            wanted["logit_bias"] = {int(key): value for key, value in self.logit_bias.items()}
        return wanted

    def seed_of(self, choice: int, default: int | None) -> int | None:
        """The seed of a choice.  The first choice has the request's seed."""
        seed = default if self.seed is None else self.seed
        return None if seed is None or seed == -1 else seed + choice


def lesser(wanted: int | None, limit: int | None) -> int | None:
    wanted = None if wanted == -1 else wanted
    return limit if wanted is None else wanted if limit is None else min(wanted, limit)


MaxTokens = Annotated[int, Field(ge=-1, lt=2**31)]


def _some_tokens(value: int | None) -> int | None:
    if value == 0:
        raise ValueError("must be at least 1")
    return value


TokenLimit = Annotated[MaxTokens | None, AfterValidator(_some_tokens)]
"""-1 or None: no limit."""


class JsonSchema(Body):
    model_config = ConfigDict(populate_by_name=True)

    name: Name = "schema"
    json_schema: Json | bool | None = Field(default=None, alias="schema")


ANY_OBJECT: dict[str, Any] = {"type": "object"}


class ResponseFormat(Body):
    """The form of the answer.  ``json_object`` may have a schema, as in llama-server."""

    model_config = ConfigDict(populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    plain_schema: Json | bool | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self._given is None:
            raise ValueError("a json_schema needs a schema; use json_object for any object")
        return self

    @property
    def _given(self) -> dict[str, Any] | bool | None:
        return self.json_schema.json_schema if self.json_schema else self.plain_schema

    @property
    def wanted(self) -> dict[str, Any] | bool | None:
        """The schema; None for text."""
        if self.type == "text":
            return None
        return ANY_OBJECT if self._given is None else self._given


class Function(Body):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Json = Field(default_factory=lambda: {"type": "object", "properties": {}})


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function

    @property
    def name(self) -> str:
        return self.function.name


class FunctionName(Body):
    name: Name


class ToolChoice(Body):
    type: Literal["function"] = "function"
    function: FunctionName

    @property
    def name(self) -> str:
        return self.function.name


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: MaxTokens | None = Field(
        default=16, validation_alias=names("max_tokens", "n_predict")
    )
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    suffix: str | None = None
    best_of: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)

    def limit(self, n_predict: int | None) -> int | None:
        """The limit of tokens for each choice."""
        return lesser(self.max_tokens, n_predict)


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: Name | None = None
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)


class TokenizeRequest(Body):
    """POST /tokenize, with llama-server's names."""

    content: Annotated[str, StringConstraints(max_length=MAX_CONTENT_LENGTH)]
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_TOKEN_IDS)]
