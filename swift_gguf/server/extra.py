"""The packages that only the server needs."""

from __future__ import annotations

from importlib.util import find_spec

from swift_gguf.errors import SwiftError

PACKAGES = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client")


def require() -> None:
    """Checks that they are installed.

    Raises:
        SwiftError: one is missing.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise SwiftError(
            f"the server needs {', '.join(missing)}; run: pip install 'swift-gguf[server]'"
        )
