"""Options of the server, and limits on requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from swift_gguf.sampling import SamplingOptions

MAX_HELD_BODIES = 32 << 20
"""Bytes of the bodies of all current requests; `max_body` if that is more.  A parsed body takes up
to 25 times its size in memory until the request is answered."""
SPARE_CONNECTIONS = 448
"""Connections besides those of waiting requests: idle ones, and clients that read, disconnect or
are refused.  With a queue of 64, this is half of the 1024 files that a process may open on Linux.
"""
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
"""Characters of a text to tokenize."""
MAX_TOKEN_IDS = 1 << 17
"""Tokens to detokenize."""
MAX_GRAMMAR_LENGTH = 64 * 1024
"""Characters of a GBNF grammar."""
MAX_DEPTH = 64
"""Levels of a JSON schema, and (times 32) of brackets in a grammar."""
MAX_REPETITION = 2000
"""Repetitions of an item in a grammar; llama.cpp's own limit for `{m,n}`."""
MAX_GRAMMAR_SIZE = 1 << 18
"""Characters of a grammar with its repetitions written out.  Each may become a rule."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of the server, named as on llama-server's command line."""

    host: str = "127.0.0.1"
    port: int = 8080
    """0: any free port."""
    api_key: str | None = field(default=None, repr=False)
    origins: tuple[str, ...] = ()
    """Web origins whose pages may call the server; ``*``: all."""
    alias: str = "model"
    """The model's name in answers."""
    queue_size: int = 64
    """Requests that may wait while one is answered."""
    max_body: int = 4 << 20
    """Bytes of a request at most."""
    n_predict: int | None = None
    """Tokens of an answer at most; None: as many as the context holds."""
    timeout_s: float = 600.0
    """Time limit of a request, with its wait in the queue.  A client also has this time to read
    what was sent."""
    receive_s: float = 30.0
    """Time that a client has to send its request."""
    drain_s: float = 30.0
    """Time that running answers have to finish after SIGTERM."""
    grammars: bool = True
    """True: clients may send grammars and schemas."""
    cache_bytes: int = 1 << 30
    """Bytes of memory for the saved states of other conversations."""
    reads_ahead: bool = True
    """True: after an answer, what is known of the conversation's next prompt is processed."""
    chat_template: str | None = field(default=None, repr=False)
    """A Jinja template that replaces the model's own."""
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of the template's variables, such as ``enable_thinking``."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """Defaults of the sampling options of requests."""

    @property
    def max_held(self) -> int:
        """Bytes of the bodies of all current requests at most."""
        return max(MAX_HELD_BODIES, self.max_body)

    @property
    def max_connections(self) -> int:
        """Connections at most; further ones get status 503."""
        return self.queue_size + SPARE_CONNECTIONS

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """True if `host` is a loopback name or address, such as ``localhost`` or ``127.0.0.1``."""
    name = host.strip("[]").lower()
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
