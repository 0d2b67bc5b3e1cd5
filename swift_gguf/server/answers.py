"""Answers requests on the model's thread, with llama_cpp's completions in OpenAI's format."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from swift_gguf.errors import ContextFullError, GrammarError, SpoiledError, TemplateError
from swift_gguf.llama.prompts import gap_tokens
from swift_gguf.sampling import llama_seed
from swift_gguf.schemas import constraint as schemas
from swift_gguf.schemas.constraint import Constraint
from swift_gguf.server import functions, grammars, reading
from swift_gguf.server.chat_requests import ChatRequest
from swift_gguf.server.errors import bad_request, one_line, unavailable
from swift_gguf.server.options import ServerOptions
from swift_gguf.server.requests import (
    ANY_OBJECT,
    CompletionRequest,
    Sampling,
    ToolChoice,
)
from swift_gguf.server.served import ServedLlama, Tally, Work
from swift_gguf.server.worker import Job

OnEnd = Callable[[Tally, float], None]
"""Called with the tally of a request and the seconds that it waited."""
Call = Callable[..., Any]
"""`create_completion` or `create_chat_completion` with all arguments but stream and seed."""

Choice = dict[str, Any]

_TOO_LONG = "exceed context window"  # of llama_cpp's ValueError


def chat(request: ChatRequest, options: ServerOptions, on_end: OnEnd) -> Work:
    """Yields the response, or, for a stream, `chat.completion.chunk` after chunk."""

    prompted: dict[str, Any] = {}

    def calls(llama: ServedLlama) -> Iterator[Call]:
        arguments = _chat_arguments(request, options, llama)
        prompted.update({name: arguments[name] for name in _PROMPTING if name in arguments})
        for _ in range(request.n):
            yield lambda **more: llama.create_chat_completion(**arguments, **more)

    def expected(llama: ServedLlama) -> reading.Expected:
        has_form = request.must_call or _schema(request) is not None
        has_thoughts = not has_form and request.grammar is None
        splits = request.reasoning_format != "none"
        return reading.Expected(
            tools=request.offered,
            must_call=request.must_call,
            splits=splits,
            before="" if has_form else before(llama),
            syntax=llama.syntax_here(thinks=has_thoughts, splits=splits) if not has_form else None,
        )

    def before(llama: ServedLlama) -> str:
        """The beginning of the answer that is already in the prompt."""
        if request.continued is None:
            return reading.OPEN if llama.thinks and request.grammar is None else ""
        return (reading.OPEN if request.continued == "reasoning_content" else "") + request.prefix

    def finish(llama: ServedLlama, choice: Choice) -> Choice:
        choice = reading.in_message(choice, expected(llama))
        if request.calls_once:
            choice = functions.first_in_message(choice)
        if request.is_legacy:
            choice = functions.in_message(choice)
        return _with_prefix(choice, request) if request.echo else choice

    def finish_stream(llama: ServedLlama, choices: Iterator[Choice]) -> Iterator[Choice]:
        choices = reading.in_stream(choices, lambda: expected(llama))
        if request.calls_once:
            choices = functions.first_in_stream(choices)
        if request.is_legacy:
            choices = functions.in_stream(choices)
        return _after_prefix(choices, request) if request.echo else choices

    def answered(llama: ServedLlama, text: str) -> None:
        if request.n == 1 and request.continued is None:
            llama.answered(prompted, text)

    kinds = ("chat.completion", "chat.completion.chunk")
    return _Envelope(
        kinds,
        request,
        options,
        calls,
        on_end,
        finish=finish,
        finish_stream=finish_stream,
        answered=answered,
    ).work


_ENDS = ("stop", "length")
"""Ends of answers to which a user replies; a tool replies to calls."""
_PROMPTING = ("messages", "tools", "chat_template_kwargs")
"""Arguments that the prompt of a chat depends on."""


def _with_prefix(choice: Choice, request: ChatRequest) -> Choice:
    """An answer with the text that it continues."""
    if request.continued is None:
        return choice
    message = choice["message"]
    text = request.prefix + (message.get(request.continued) or "")
    return {**choice, "message": {**message, request.continued: text}}


def _after_prefix(choices: Iterator[Choice], request: ChatRequest) -> Iterator[Choice]:
    """The text that an answer continues, and then its chunks."""
    first = next(choices)
    yield first
    if request.continued:
        yield {**first, "delta": {request.continued: request.prefix}, "logprobs": None}
    yield from choices


def complete(request: CompletionRequest, options: ServerOptions, on_end: OnEnd) -> Work:
    """Yields the response, or, for a stream, `text_completion` after `text_completion`."""

    def calls(llama: ServedLlama) -> Iterator[Call]:
        llama.expect(None)
        arguments = _completion_arguments(request, options, llama)
        for prompt in [_prompt(given, llama) for given in request.prompts]:
            for _ in range(request.n):
                yield lambda prompt=prompt, **more: llama.complete(prompt, **arguments, **more)

    kinds = ("text_completion", "text_completion")
    return _Envelope(kinds, request, options, calls, on_end).work


class _Envelope:
    """Combines one or several answers of llama_cpp into one of OpenAI's."""

    def __init__(
        self,
        kinds: tuple[str, str],
        request: ChatRequest | CompletionRequest,
        options: ServerOptions,
        calls: Callable[[ServedLlama], Iterator[Call]],
        on_end: OnEnd,
        *,
        finish: Callable[[ServedLlama, Choice], Choice] = lambda _, choice: choice,
        finish_stream: Callable[
            [ServedLlama, Iterator[Choice]], Iterator[Choice]
        ] = lambda _, choices: choices,
        answered: Callable[[ServedLlama, str], None] = lambda *_: None,
    ) -> None:
        """kinds: `object` of the whole and of a chunk.
        finish, finish_stream: convert llama_cpp's choices.
        answered: called with the text of a chat's message that a user may reply to.
        """
        self._answered = answered
        self._request, self._options = request, options
        self._finish, self._finish_stream = finish, finish_stream
        self._calls, self._on_end = calls, on_end
        prefix = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kinds[request.stream],
            "created": int(time.time()),
            "model": options.alias,
            "system_fingerprint": "swift-gguf",
        }

    def work(self, llama: ServedLlama, job: Job[ServedLlama]) -> Iterator[object]:
        reuses = self._request.cache_prompt is not False
        with llama.working_for(job, reuses=reuses) as tally, _telling():
            answer = None
            try:
                if self._request.stream:
                    yield from self._stream(llama, job, tally)
                else:
                    answer = self._whole(llama, job, tally)
            finally:
                self._on_end(tally, job.queue_s)
            if answer is not None:  # after it was added to the metrics
                yield answer

    def _seeds(self) -> Iterator[int]:
        default = self._options.sampling.seed
        for i in range(2**32):
            yield llama_seed(self._request.seed_of(i, default))

    def _whole(self, llama: ServedLlama, job: Job[ServedLlama], tally: Tally) -> dict[str, Any]:
        choices: list[Choice] = []
        for call, seed in zip(self._calls(llama), self._seeds(), strict=False):
            choice = self._finish(llama, call(seed=seed)["choices"][0])
            message = choice.get("message", {})
            if choice["finish_reason"] in _ENDS and message.get("content"):
                self._answered(llama, message["content"])
            choices.append({**choice, "index": len(choices)})
        return {
            **self._head,
            "choices": choices,
            "usage": usage(tally, self._request.n),
            "timings": timings(tally, job.queue_s),
        }

    def _stream(
        self, llama: ServedLlama, job: Job[ServedLlama], tally: Tally
    ) -> Iterator[dict[str, Any]]:
        for i, (call, seed) in enumerate(zip(self._calls(llama), self._seeds(), strict=False)):
            choices = (chunk["choices"][0] for chunk in call(seed=seed, stream=True))
            text = ""
            for choice in self._finish_stream(llama, choices):
                text += choice.get("delta", {}).get("content") or ""
                if choice["finish_reason"] in _ENDS and text:
                    self._answered(llama, text)
                ends = {"timings": timings(tally, job.queue_s)} if choice["finish_reason"] else {}
                yield {**self._head, "choices": [{**choice, "index": i}], **ends}
        if self._request.wants_usage:
            yield {**self._head, "choices": [], "usage": usage(tally, self._request.n)}


@contextmanager
def _telling() -> Iterator[None]:
    """Reports errors of the request as such.  Other errors are errors of the server."""
    try:
        yield
    except TemplateError as error:
        raise bad_request(
            f"the chat template cannot render the messages: {one_line(error)}", param="messages"
        ) from error
    except SpoiledError as error:  # a second try runs without drafts
        raise unavailable(one_line(error), code="draft_weights", retry_s=1.0) from error
    except GrammarError as error:
        raise bad_request(one_line(error), param="grammar") from error
    except UnicodeEncodeError as error:
        raise bad_request("a lone surrogate is not a character") from error
    except (ContextFullError, ValueError) as error:
        if isinstance(error, ValueError) and _TOO_LONG not in str(error):
            raise
        raise bad_request(
            f"the prompt is too long: {one_line(error)}", code="context_length_exceeded"
        ) from error


def usage(tally: Tally, n: int) -> dict[str, Any]:
    """OpenAI's `usage`.  A prompt counts once for all its `n` choices."""
    prompt = tally.prompt_tokens // n
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tally.completion_tokens,
        "total_tokens": prompt + tally.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": max(prompt - tally.stats.prompt_n, 0)},
    }


def timings(tally: Tally, queue_s: float) -> dict[str, Any]:
    """llama-server's `timings`, and the time that the request waited in the queue."""
    stats, rate = tally.stats, tally.predicted_per_second
    return {
        "cache_n": tally.prompt_tokens - stats.prompt_n,
        "prompt_n": stats.prompt_n,
        "prompt_ms": stats.prompt_s * 1e3,
        "prompt_per_token_ms": _ratio(stats.prompt_s * 1e3, stats.prompt_n),
        "prompt_per_second": _ratio(stats.prompt_n, stats.prompt_s),
        "predicted_n": stats.predicted_n,
        "predicted_ms": stats.cycle_s * 1e3,
        "predicted_per_token_ms": _ratio(1e3, rate),
        "predicted_per_second": rate,
        "draft_n": stats.drafted,
        "draft_n_accepted": stats.accepted,
        "queue_ms": queue_s * 1e3,
    }


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


# -- arguments -------------------------------------------------------------------------------------


def _chat_arguments(
    request: ChatRequest, options: ServerOptions, llama: ServedLlama
) -> dict[str, Any]:
    arguments = _common(request, options, llama)
    arguments["max_tokens"] = request.limit(options.n_predict)
    as_text = llama.calls_as_text(has_tools=bool(request.offered))
    arguments["messages"] = [m.as_dict(calls_as_text=as_text) for m in request.prompted]
    prompting = request.prompting(options.template_variables)
    arguments |= {
        "chat_template_kwargs": prompting.variables,
        "continue_final_message": prompting.continues or False,
        "add_generation_prompt": prompting.opens_answer,
    }
    if request.logprobs:
        arguments |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    if request.offered:
        arguments["tools"] = [tool.model_dump(exclude_none=True) for tool in request.offered]
    elif request.choice not in (None, "auto", "none"):
        raise bad_request(
            "tool_choice asks for a call, but there are no tools", param="tool_choice"
        )
    form = _form(request, options)
    if form is not None:
        if request.grammar is not None:
            raise bad_request("give a grammar or a response_format, not both", param="grammar")
        arguments["grammar"] = form
    if request.must_call:
        llama.expect(None)
    else:
        begins = prompting.opens_answer and prompting.continues is None
        offered = arguments.get("tools", []) if begins else None
        stops = llama.expect(offered, prompting.variables)
        arguments["stop"] = [*arguments.get("stop", ()), *stops]
    return arguments


def _form(request: ChatRequest, options: ServerOptions) -> Constraint | None:
    """The constraint of the answer: JSON by a schema, a call, or one of both."""
    schema = _schema(request)
    tools = [schemas.Tool(tool.name, tool.function.parameters) for tool in request.offered]
    if request.must_call:
        _allow(options, "tool_choice")
        choice = request.choice
        if isinstance(choice, ToolChoice):
            tools = [tool for tool in tools if tool.name == choice.name]
        if not tools:
            raise bad_request("tool_choice is not one of the tools", param="tool_choice")
        with _naming("tools"):
            return schemas.call_of(tools)
    if schema is None:
        return None
    if schema != ANY_OBJECT or tools:
        _allow(options, "response_format")
    with _naming("response_format"):
        form = schemas.json_by(schema)
    if not tools:
        return form
    with _naming("tools"):
        return schemas.answer_or_calls(schema, tools)


@contextmanager
def _naming(param: str) -> Iterator[None]:
    """Reports a schema that is not supported as an error in this field of the request."""
    try:
        yield
    except GrammarError as error:
        raise bad_request(f"{param}: {one_line(error)}", param=param) from error


def _allow(options: ServerOptions, param: str) -> None:
    if not options.grammars:
        raise bad_request("this server does not accept grammars or schemas", param=param)


def _schema(request: ChatRequest) -> dict[str, Any] | bool | None:
    return request.response_format.wanted if request.response_format else None


def _completion_arguments(
    request: CompletionRequest, options: ServerOptions, llama: ServedLlama
) -> dict[str, Any]:
    if request.suffix and gap_tokens(llama.vocab) is None:
        raise bad_request(
            "suffix is not supported: the model's vocabulary has no FIM tokens", param="suffix"
        )
    if request.best_of not in (None, 1, request.n):
        raise bad_request("best_of is not supported", param="best_of")
    return _common(request, options, llama) | {
        "max_tokens": request.limit(options.n_predict),
        "suffix": request.suffix or None,
        "echo": request.echo,
        "logprobs": request.logprobs,
    }


def _common(request: Sampling, options: ServerOptions, llama: ServedLlama) -> dict[str, Any]:
    arguments = request.sampling(options.sampling)
    n = request.repeat_last_n
    llama.look_back(options.sampling.repeat_last_n if n is None else n)
    if any(token >= llama.n_vocab() for token in arguments.get("logit_bias", ())):
        raise bad_request("a token id is not in the vocabulary", param="logit_bias")
    if request.grammar is not None:
        _allow(options, "grammar")
    gbnf = options.sampling.grammar if request.grammar is None else request.grammar
    if gbnf is not None:
        arguments["grammar"] = _grammar(gbnf, llama, "grammar")
    return arguments


def _grammar(gbnf: str, llama: ServedLlama, param: str) -> Any:
    from llama_cpp import LlamaGrammar

    grammars.check(llama.vocab, gbnf, param=param)
    return LlamaGrammar.from_string(gbnf, verbose=False)


def _prompt(given: str | list[int], llama: ServedLlama) -> str | list[int]:
    if not given and llama.token_bos() < 0:
        raise bad_request("the prompt is empty", param="prompt")
    if not isinstance(given, str) and any(token >= llama.n_vocab() for token in given):
        raise bad_request("a token id is not in the vocabulary", param="prompt")
    return given
