"""Errors in OpenAI's form."""

from __future__ import annotations

from typing import Any

from swift_gguf.errors import SwiftError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(SwiftError):
    """An error for the client: an HTTP status and OpenAI's `error` object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_s = status, code, param, retry_s

    @property
    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_s is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400: the request is wrong."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, *, code: str, retry_s: float) -> ApiError:
    """Status 503: the same request may succeed later."""
    return ApiError(503, message, code=code, retry_s=retry_s)


def one_line(error: BaseException) -> str:
    """The message of an exception in one line."""
    return " ".join(str(error).split())[:500] or type(error).__name__
