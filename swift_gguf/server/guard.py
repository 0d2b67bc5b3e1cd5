"""What every request must pass before it is looked at: who asks, from where, and how much."""

from __future__ import annotations

import asyncio
import hmac
import logging
from urllib.parse import urlsplit

from sse_starlette.sse import SendTimeoutError
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swift_gguf.server.errors import ApiError
from swift_gguf.server.options import ServerOptions, is_loopback

_log = logging.getLogger("swift_gguf")

PUBLIC = ("/", "/health", "/v1/health")
"""Paths that need no key."""


class ClientGone(Exception):
    """The client left before its request was there."""


class Guard:
    """ASGI middleware: key, origin, size and patience; and headers on whatever leaves."""

    def __init__(self, app: ASGIApp, *, options: ServerOptions) -> None:
        self._app, self._options = app, options
        self._key = None if options.api_key is None else options.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_origin(headers)
            self._check_key(headers, scope["path"])
            if scope["method"] in ("POST", "PUT", "PATCH"):
                self._check_kind(scope, headers)
                receive = await self._whole_body(headers, receive)
        except ApiError as error:
            headers_out = {**error.headers, "Connection": "close"}  # the body may not be read
            response = JSONResponse(error.body, error.status, headers_out)
            await response(scope, receive, send_on)
        except ClientGone:
            pass
        else:
            try:
                await self._app(scope, receive, send_on)
            except SendTimeoutError:
                _log.info("a client read nothing for %g s", self._options.timeout_s)

    def _check_key(self, headers: Headers, path: str) -> None:
        if self._key is None or path in PUBLIC:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        if not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def _check_origin(self, headers: Headers) -> None:
        """A page that the person visits must not talk to a server that needs no key.

        Browsers say where a page comes from; and a foreign name that leads to this machine (DNS
        rebinding) shows in Host.
        """
        if self._key is not None:
            return
        host = headers.get("host", "")
        if self._options.is_loopback and not is_loopback(_host_name(f"//{host}")):
            raise ApiError(403, f"this server is not {host}; use 127.0.0.1", code="wrong_host")
        origin = headers.get("origin")
        if origin is None or origin in self._options.origins or "*" in self._options.origins:
            return
        is_page = origin.startswith(("http:", "https:")) or origin == "null"
        is_own = origin.partition("://")[2] == host
        if is_page and not is_own and not is_loopback(_host_name(origin)):
            raise ApiError(
                403, f"pages of {origin} may not call this server; see --cors", code="wrong_origin"
            )

    def _check_kind(self, scope: Scope, headers: Headers) -> None:
        """Other sites' pages may send anything but JSON unasked.

        Who has the key is none of them: `curl -d` is taken as it comes.
        """
        kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if self._key is not None:
            MutableHeaders(scope=scope)["content-type"] = "application/json"
        elif kind != "application/json":
            raise ApiError(
                415, f"send JSON, as Content-Type: application/json; this is {kind}", code="no_json"
            )

    async def _whole_body(self, headers: Headers, receive: Receive) -> Receive:
        try:
            body = await asyncio.wait_for(self._read(headers, receive), self._options.receive_s)
        except asyncio.TimeoutError:
            raise ApiError(408, "the request took too long to arrive", code="timeout") from None
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return replay

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        limit = self._options.max_body
        too_large = ApiError(413, f"more than {limit} bytes; see --max-body", code="too_large")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_large
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise too_large
            more = message.get("more_body", False)
        return b"".join(parts)


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
