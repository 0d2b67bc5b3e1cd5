"""What every request must pass before it is looked at: who asks, from where, and how much."""

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
    """The client left before its request was there."""


class Room:
    """Bytes that all requests share."""

    def __init__(self, size: int) -> None:
        self.left = size


class Share:
    """What one request has of a room."""

    def __init__(self, room: Room) -> None:
        self._room, self._size = room, 0

    def take(self, n: int) -> bool:
        """So many bytes more; False: there are not as many left."""
        if n > self._room.left:
            return False
        self._room.left -= n
        self._size += n
        return True

    def give_back(self) -> None:
        """All of it."""
        self._room.left += self._size
        self._size = 0


class Guard:
    """ASGI middleware: key, origin, size and patience; and headers on whatever leaves."""

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
        too_large = ApiError(413, f"more than {limit} bytes; see --max-body", code="too_large")
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
            else:  # the rest is read all the same: who still sends does not hear an answer
                share.give_back()
                parts.clear()
            more = message.get("more_body", False)
        if not fits:
            raise _busy("the requests under way are too large together")
        return b"".join(parts)


def refusal(error: ApiError) -> JSONResponse:
    """For a request whose body may not have been read: its connection ends."""
    return JSONResponse(error.body, error.status, {**error.headers, "Connection": "close"})


async def too_many(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI application of connections that are too many."""
    await refusal(_busy("there are too many connections"))(scope, receive, send)


def _busy(why: str) -> ApiError:
    return unavailable(f"{why}; try again later", code="queue_full", retry_s=BUSY_RETRY_S)


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
