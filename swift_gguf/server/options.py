"""How the server serves; and how much of what a client sends it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from swift_gguf.sampling import SamplingOptions

MAX_HELD_BODIES = 32 << 20
"""Bytes of the bodies of all requests under way, or one body, if `max_body` is more.  A request
keeps what its body was parsed to, up to 25 times as much, until it is answered."""
SPARE_CONNECTIONS = 448
"""Connections besides those of the requests that may wait: idle ones, and clients that read, leave
or are refused.  With a queue of 64, half of the 1024 files that Linux lets a process open."""
MAX_CHOICES = 8
MAX_MESSAGES = 2048
MAX_INPUTS = 64
"""Prompts in one request."""
MAX_TEXTS = 2048
"""Texts to embed in one request."""
MAX_STOPS = 128
MAX_STOP_LENGTH = 1024
MAX_TOOLS = 128
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_NAME_LENGTH = 256
MAX_CONTENT_LENGTH = 1 << 18
"""Of a text to tokenize, in characters."""
MAX_TOKEN_IDS = 1 << 17
"""Tokens to make a text of."""
MAX_GRAMMAR_LENGTH = 64 * 1024
"""Of GBNF, in characters."""
MAX_DEPTH = 64
"""Of brackets in a grammar, and of a JSON schema."""
MAX_REPETITION = 2000
"""Of an item in a grammar; llama.cpp's own limit for `{m,n}`."""
MAX_GRAMMAR_SIZE = 1 << 18
"""Characters, with repetitions written out; llama.cpp may make a rule of each."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Names follow llama-server's command line."""

    host: str = "127.0.0.1"
    port: int = 8080
    """0: a free one."""
    api_key: str | None = field(default=None, repr=False)
    origins: tuple[str, ...] = ()
    """Web origins whose pages may call the server; ``*``: all."""
    alias: str = "model"
    """The model's name in answers."""
    queue_size: int = 64
    """Requests that may wait while one is answered."""
    max_body: int = 4 << 20
    """Bytes of a request."""
    n_predict: int | None = None
    """Tokens of an answer at most; None: as many as the context holds."""
    timeout_s: float = 600.0
    """For one request, its wait in the queue included; and for a client to read what was sent."""
    receive_s: float = 30.0
    """For a client to send its request."""
    drain_s: float = 30.0
    """How long running answers may go on after SIGTERM."""
    grammars: bool = True
    """May clients send grammars and schemas?"""
    cache_bytes: int = 1 << 30
    """Memory for conversations that are not the present one."""
    chat_template: str | None = field(default=None, repr=False)
    """Jinja, instead of the model's own."""
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """What it is told, unless a request says otherwise: ``enable_thinking``, ..."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """What a request gets that does not say."""

    @property
    def max_held(self) -> int:
        """Bytes of all bodies at a time."""
        return max(MAX_HELD_BODIES, self.max_body)

    @property
    def max_connections(self) -> int:
        """Beyond them, 503."""
        return self.queue_size + SPARE_CONNECTIONS

    @property
    def is_loopback(self) -> bool:
        """Can only this machine reach the server?"""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Is this the name or address of the machine itself, as seen by itself?"""
    name = host.strip("[]").lower()
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
