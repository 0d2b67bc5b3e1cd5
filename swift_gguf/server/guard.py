"""Checks every request before it is handled: API key, origin, content type and size."""

from __future__ import annotations

import asyncio
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swift_gguf.server.errors import ApiError, unavailable
from swift_gguf.server.options import ServerOptions, is_loopback

PUBLIC = ("/", "/health", "/v1/health")
"""Paths that need no key."""
BUSY_RETRY_S = 5.0


class ClientGone(Exception):
    """The client disconnected before its request had arrived."""


class Room:
    """Memory in bytes that the bodies of all requests share."""

    def __init__(self, size: int) -> None:
        self.left = size


class Share:
    """The memory that one request uses of a `Room`."""

    def __init__(self, room: Room) -> None:
        self._room, self._size = room, 0

    def take(self, n: int) -> bool:
        """Takes `n` more bytes.  False: too few are left."""
        if n > self._room.left:
            return False
        self._room.left -= n
        self._size += n
        return True

    def give_back(self) -> None:
        """Gives all bytes back."""
        self._room.left += self._size
        self._size = 0


class Guard:
    """ASGI middleware that checks requests, limits their time, and sets a header on responses."""

    def __init__(self, app: ASGIApp, *, options: ServerOptions) -> None:
        self._app, self._options = app, options
        self._room = Room(options.max_held)
        self._key = None if options.api_key is None else options.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        share = Share(self._room)
        try:
            await self._answer(scope, receive, send, share)
        finally:
            share.give_back()

    async def _answer(self, scope: Scope, receive: Receive, send: Send, share: Share) -> None:
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
                receive = await self._whole_body(headers, receive, share)
        except ApiError as error:
            await refusal(error)(scope, receive, send_on)
        except ClientGone:
            pass
        else:
            await self._app(scope, receive, send_on)

    def _check_key(self, headers: Headers, path: str) -> None:
        if self._key is None or path in PUBLIC:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        if not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def _check_origin(self, headers: Headers) -> None:
        """Without a key, web pages of other sites must not use the server.

        Browsers send the page's origin.  The Host header shows another site's name that resolves
        to this machine (DNS rebinding).
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
        """Requires JSON: browsers let other sites' pages send any other type without asking.

        A client with the key is not such a page, so `curl -d` works without a content type.
        """
        kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if self._key is not None:
            MutableHeaders(scope=scope)["content-type"] = "application/json"
        elif kind != "application/json":
            raise ApiError(
                415, f"send JSON with Content-Type: application/json, not {kind}", code="no_json"
            )

    async def _whole_body(self, headers: Headers, receive: Receive, share: Share) -> Receive:
        reading = self._read(headers, receive, share)
        try:
            body = await asyncio.wait_for(reading, self._options.receive_s)
        except asyncio.TimeoutError:
            raise ApiError(408, "the request took too long to arrive", code="timeout") from None
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return replay

    async def _read(self, headers: Headers, receive: Receive, share: Share) -> bytes:
        limit = self._options.max_body
        too_large = ApiError(
            413, f"the request has more than {limit} bytes; see --max-body", code="too_large"
        )
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_large
        parts: list[bytes] = []
        size, fits, more = 0, True, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise too_large
            if fits := fits and share.take(len(part)):
                parts.append(part)
            else:  # read the rest, because a client reads the response only after it has sent all
                share.give_back()
                parts.clear()
            more = message.get("more_body", False)
        if not fits:
            raise _busy("the current requests together are too large")
        return b"".join(parts)


def refusal(error: ApiError) -> JSONResponse:
    """The response to a request whose body may be unread: it closes the connection."""
    return JSONResponse(error.body, error.status, {**error.headers, "Connection": "close"})


async def too_many(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI application of connections beyond the limit."""
    await refusal(_busy("there are too many connections"))(scope, receive, send)


def _busy(why: str) -> ApiError:
    return unavailable(f"{why}; try again later", code="queue_full", retry_s=BUSY_RETRY_S)


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
