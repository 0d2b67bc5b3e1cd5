"""The HTTP routes, and how the events of a job become a response."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from hashlib import sha256
from http import HTTPStatus
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from swift_gguf import __version__
from swift_gguf.native import library
from swift_gguf.server import answers, embedding
from swift_gguf.server.chat_requests import ChatRequest
from swift_gguf.server.errors import ApiError, bad_request
from swift_gguf.server.guard import Guard
from swift_gguf.server.requests import (
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from swift_gguf.server.served import ServedLlama, Started
from swift_gguf.server.service import Service
from swift_gguf.server.worker import Job
from swift_gguf.text import one_bos

_log = logging.getLogger("swift_gguf")
_T = TypeVar("_T")

GONE = 499
PAGE_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(service: Service) -> FastAPI:
    """The application.  It loads the model when it starts and frees it when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    options = service.options
    app = FastAPI(
        title="swift-gguf", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_middleware(Guard, options=options)
    if options.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    openai = _openai_routes(service)
    app.include_router(openai, prefix="/v1")
    app.include_router(openai, include_in_schema=False)  # llama-server has both paths
    app.include_router(_native_routes(service))
    app.include_router(_page_route())
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


# -- routes ----------------------------------------------------------------------------------------


def _openai_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        job = service.submit(answers.chat(body, service.options, service.count))
        return await _answer(service, job, request, stream=body.stream)

    @router.post("/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        job = service.submit(answers.complete(body, service.options, service.count))
        return await _answer(service, job, request, stream=body.stream)

    @router.post("/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        job = service.submit(embedding.embed(body, service.options))
        return await _answer(service, job, request, stream=False)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card()]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.options.alias:
            raise ApiError(404, f"there is no model {name!r}", code="model_not_found")
        return service.model_card()

    return router


def _native_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    @router.get("/v1/health", include_in_schema=False)
    async def health() -> dict[str, str]:
        service.require_model()
        return {"status": "ok"}

    @router.get("/props")
    async def props() -> dict[str, Any]:
        return service.props()

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        return await asyncio.to_thread(_tokenize, service, body)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        return await asyncio.to_thread(_detokenize, service, body)

    return router


def _page_route() -> APIRouter:
    """The built-in page, read once from the package.

    The browser runs only the scripts that are inside the page.
    """
    router = APIRouter(include_in_schema=False)
    page = (files("swift_gguf.server") / "page.html").read_text(encoding="utf-8")
    policy = PAGE_POLICY.format(**{tag: _hash(page, tag) for tag in ("script", "style")})
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}

    @router.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers=headers)

    return router


def _hash(page: str, tag: str) -> str:
    """The hash of an element's content, in the form of Content-Security-Policy."""
    text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"


def _tokenize(service: Service, body: TokenizeRequest) -> Response:
    """The whole response, because the event loop should not spend time on its JSON."""
    text = _utf8(body.content)
    with service.vocabulary() as model:
        ids = model.tokenize(text, add_bos=body.add_special, special=body.parse_special)
        ids = one_bos(ids, model.token_bos()) if body.add_special else ids
        # a long text has many tokens but few different ones: convert each to JSON once
        shown = {id: _shown(model, id) if body.with_pieces else str(id) for id in set(ids)}
    return _ready(f'{{"tokens":[{",".join(map(shown.__getitem__, ids))}]}}')


def _shown(model: ServedLlama, id: int) -> str:
    piece = library().token_bytes(model.vocab, id, special=True)
    return _json({"id": id, "piece": _text_or_bytes(piece)})


def _detokenize(service: Service, body: DetokenizeRequest) -> Response:
    """The whole response, as in `_tokenize`."""
    with service.vocabulary() as model:
        if any(token >= model.n_vocab() for token in body.tokens):
            raise bad_request("a token id is not in the vocabulary", param="tokens")
        pieces = [library().token_bytes(model.vocab, id, special=True) for id in body.tokens]
    return _ready(_json({"content": b"".join(pieces).decode("utf-8", "replace")}))


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request("a lone surrogate is not a character", param="content") from None


def _text_or_bytes(piece: bytes) -> str | list[int]:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return list(piece)


# -- from jobs to responses ------------------------------------------------------------------------


async def _answer(
    service: Service, job: Job[ServedLlama], request: Request, *, stream: bool
) -> Response:
    """The job's response.  The job ends when the client disconnects."""
    events = job.events()
    try:
        first = await _unless_gone(request, anext(events))
        if stream:
            # from here on the response itself notices when the client disconnects
            return EventSourceResponse(_sse(service, job, events), sep="\n")
        async with aclosing(events):
            while isinstance(first, Started):
                first = await _unless_gone(request, anext(events))
            return _ready(_json(first))
    except BaseException as error:
        service.stop(job, _gone())
        await events.aclose()
        if isinstance(error, ApiError) and error.status == GONE:
            return Response(status_code=GONE)
        raise


async def _sse(
    service: Service, job: Job[ServedLlama], events: AsyncGenerator[object, None]
) -> AsyncIterator[dict[str, str]]:
    try:
        async for event in events:
            if not isinstance(event, Started):
                yield {"data": _json(event)}
        yield {"data": "[DONE]"}
    except ApiError as error:
        yield {"data": _json(error.body)}
    except Exception as error:
        _log.exception("an answer failed")
        yield {"data": _json(ApiError(500, _failed(error)).body)}
    finally:
        service.stop(job, _gone())


def _ready(text: str) -> Response:
    """A response with this JSON."""
    return Response(text, media_type="application/json")


def _json(value: object) -> str:
    """Compact JSON.  `default` converts the numpy numbers of llama_cpp's log-probabilities."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=float)


async def _unless_gone(request: Request, awaitable: Awaitable[_T]) -> _T:
    """Awaits `awaitable`, unless the client disconnects first.

    Raises:
        ApiError: the client has disconnected (status GONE).
    """
    wanted = asyncio.ensure_future(awaitable)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        raise _gone()
    finally:
        gone.cancel()
        if not wanted.done():
            wanted.cancel()
            await asyncio.wait({wanted})


def _gone() -> ApiError:
    """A new exception each time, because one that is raised twice keeps the frames of both."""
    return ApiError(GONE, "the client has disconnected", code="client_gone")


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# -- errors ----------------------------------------------------------------------------------------

Handler = Callable[[Request, Exception], Awaitable[Response]]


def _response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


async def _told(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)


_IN_PLAIN_WORDS = {
    "missing": "it is missing",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
}
"""Replaces messages of pydantic that name Python's types."""


async def _invalid(_: Request, error: Exception) -> Response:
    """Status 400 as in OpenAI's API, where FastAPI has 422."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    # a field may have several types, and pydantic lists the wrong types first: prefer another error
    told = next((e for e in errors if not e["type"].endswith(("_type", "_parsing"))), errors[0])
    if told["type"] == "json_invalid":
        return _response(bad_request("the body is not valid JSON"))
    param = _place(told["loc"][1:], error.body, is_missing=told["type"] == "missing") or None
    if error.body is None:
        return _response(bad_request("the body is empty: send a JSON object"))
    plain = _IN_PLAIN_WORDS.get(told["type"])
    where = param or ("the body" if plain else "")
    message = plain or told["msg"].removeprefix("Value error, ")
    return _response(bad_request(f"{where}: {message}" if where else message, param=param))


def _place(names: Sequence[str | int], body: Any, *, is_missing: bool) -> str:
    """The place in the body that an error is about, without pydantic's names of types."""
    place: list[str] = []
    for name in names:
        try:
            body = body[name]
        except (LookupError, TypeError):
            if not is_missing or name != names[-1]:
                break
        place.append(str(name))
    return ".".join(place)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, UnicodeDecodeError):
        return _response(bad_request("the body is not valid JSON: it is not UTF-8"))
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = HTTPStatus(error.status_code).name.lower()  # not_found, method_not_allowed
    return _response(ApiError(error.status_code, message, code=code))


async def _unexpected(_: Request, error: Exception) -> Response:
    return _response(ApiError(500, _failed(error)))


def _failed(error: Exception) -> str:
    return f"the server failed: {type(error).__name__}"
