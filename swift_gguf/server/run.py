"""Runs the server with uvicorn: the socket, signals and the shutdown."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from swift_gguf.errors import SwiftError
from swift_gguf.server.app import create_app
from swift_gguf.server.guard import too_many
from swift_gguf.server.options import ServerOptions
from swift_gguf.server.served import ServedLlama
from swift_gguf.server.service import Service

_log = logging.getLogger("swift_gguf")

FAREWELL_S = 5.0
"""Time after `drain_s` in which clients receive the end of their responses."""


def serve(
    load: Callable[[], ServedLlama],
    options: ServerOptions,
    *,
    on_listening: Callable[[str], None] = lambda url: None,
    on_ready: Callable[[ServedLlama], None] = lambda model: None,
    stop_loading: Callable[[], None] = lambda: None,
) -> None:
    """Listens, loads the model in the background, and serves until SIGTERM or Ctrl-C.

    After the signal, running answers have `drain_s` to finish.  Waiting requests are refused at
    once, and loading stops.  A second signal ends everything.

    If the model's thread is still inside llama.cpp at the end, the process exits without a return,
    because unloading the library under that thread would crash.

    on_listening: called with the address.
    on_ready: called in the model's thread.
    stop_loading: makes `load` end early; called from any thread.

    Raises:
        SwiftError: the server cannot listen on the address.
        KeyboardInterrupt: Ctrl-C ended the server.
        Whatever `load` raises.
    """
    listener = _bind(options)
    port = listener.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host

    def on_loaded() -> None:
        if service.model is not None:
            on_ready(service.model)
        elif loop := server.loop:
            loop.call_soon_threadsafe(server.leave)

    service = Service(load, options, on_loaded=on_loaded, stop_loading=stop_loading)
    config = uvicorn.Config(
        create_app(service),
        http=partial(_PatientProtocol, options=options),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(options.drain_s + FAREWELL_S),
    )
    server = _Server(config, service)
    with listener:
        on_listening(f"http://{host}:{port}")
        server.run(sockets=[listener])
    if service.error:
        raise service.error
    if service.is_stuck:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if server.interrupted else 0)
    if server.interrupted:
        raise KeyboardInterrupt


def _bind(options: ServerOptions) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise SwiftError(
            f"cannot listen on {options.host}, port {options.port}: {error.strerror or error}; "
            "use another --host or --port"
        ) from error
    return listener


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.interrupted = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self._service = service

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Sets signal handlers on the loop.  sse_starlette looks for uvicorn's own handler method,
        and would end every stream at once."""
        self.loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            self.loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            # The process ends, and another signal would change its exit code.  asyncio restores
            # Python's handler first, so signals are blocked meanwhile.
            signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
            for number in numbers:
                self.loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def _on_signal(self, number: int) -> None:
        self.interrupted = self.interrupted or number == signal.SIGINT
        if self.should_exit:
            self._service.stop_current()
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        self.leave()

    def leave(self) -> None:
        """Begins the shutdown."""
        if not self.should_exit and self.loop:
            self.should_exit = True
            self._service.drain(reason="the server is shutting down")
            self.loop.call_later(self._service.options.drain_s, self._service.stop_current)


class _PatientProtocol(H11Protocol):
    """uvicorn's protocol with time limits.

    uvicorn itself waits without a limit for the first request of a connection, and for a client to
    read its response.

    Connections beyond the limit get status 503 in OpenAI's form.  (uvicorn's `limit_concurrency`
    has another form.)
    """

    def __init__(self, *args: Any, options: ServerOptions, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options, self._patience_s = options, options.receive_s
        self._patience: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._options.max_connections:
            self.app = too_many
        # so that `pause_writing` is called as soon as the client does not read everything
        transport.set_write_buffer_limits(high=0)
        self._patience = self.loop.call_later(self._patience_s, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._patience, self._stall):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self._options.timeout_s, self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall:
            self._stall.cancel()

    def _abort(self) -> None:
        """Ends the connection at once.  `close` would wait until the client has read everything."""
        _log.info("a client did not read its answer in %g s", self._options.timeout_s)
        self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._patience:
            self._patience.cancel()
        if not self.transport.is_closing():
            patience_s = self._patience_s + self.timeout_keep_alive
            self._patience = self.loop.call_later(patience_s, self._give_up)

    def _give_up(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if not is_answering and not self.transport.is_closing():
            self.transport.close()
