"""swift_gguf.h's speculators for ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift_gguf.model.model import Model
from swift_gguf.native.abi import DraftRequest
from swift_gguf.native.binding import library

INT, DOUBLE, POINTER = ctypes.c_int32, ctypes.c_double, ctypes.c_void_p
INTS, TEXT, SIZE = ctypes.POINTER(INT), ctypes.c_char_p, ctypes.c_size_t

SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "init": (POINTER, [POINTER, TEXT, POINTER, TEXT, SIZE]),
    "free": (None, [POINTER]),
    "measure": (INT, [POINTER, DOUBLE]),
    "begin": (INT, [POINTER, INT]),
    "draft": (INT, [POINTER, ctypes.POINTER(DraftRequest), INT, INT]),
    "passed": (None, [POINTER, DOUBLE, DOUBLE]),
    "learn": (INT, [POINTER, INT, INT, INT]),
    "accept": (INT, [POINTER, INT, INTS, INT]),
    "why": (TEXT, [POINTER]),
    "save": (ctypes.c_bool, [POINTER, TEXT, SIZE]),
}


def call(name: str, *arguments: Any) -> Any:
    function = getattr(library().api._lib, f"swift_gguf_speculator_{name}")
    function.restype, function.argtypes = SIGNATURES[name]
    return function(*arguments)


class Speculator:
    """A speculator of a model's context.

    Raises:
        ValueError: it cannot be made; says why.
    """

    def __init__(self, model: Model, profile: Path | None = None) -> None:
        error = ctypes.create_string_buffer(256)
        path = str(profile).encode() if profile else None
        self.pointer = call("init", model.ctx, path, None, error, len(error))
        if not self.pointer:
            raise ValueError(error.value.decode())

    def close(self) -> None:
        call("free", self.pointer)
        self.pointer = None

    def measure(self, seconds: float) -> int:
        return int(call("measure", self.pointer, seconds))

    def begin(self, seq_id: int = 0) -> None:
        assert call("begin", self.pointer, seq_id) == 0

    def draft(self, *texts: Sequence[int], n_max: int = 32, n_others: int = 0) -> list[list[int]]:
        """Of sequences 0, 1, ..."""
        requests = (DraftRequest * len(texts))()
        rooms = [(INT * max(1, n_max))() for _ in texts]
        held = [(INT * len(text))(*text) for text in texts]
        for i, (request, text, room) in enumerate(zip(requests, held, rooms, strict=True)):
            request.seq_id, request.text, request.n_text = i, text, len(text)
            request.pos, request.n_max, request.draft = len(text) - 1, n_max, room
        assert call("draft", self.pointer, requests, len(texts), n_others) == 0
        return [
            list(room[: request.n_draft]) for request, room in zip(requests, rooms, strict=True)
        ]

    def passed(self, draft_ms: float, pass_ms: float) -> None:
        call("passed", self.pointer, draft_ms, pass_ms)

    def learn(self, row: int, n_rows: int, seq_id: int = 0) -> int:
        return int(call("learn", self.pointer, seq_id, row, n_rows))

    def accept(self, tokens: Sequence[int], seq_id: int = 0) -> None:
        assert call("accept", self.pointer, seq_id, (INT * len(tokens))(*tokens), len(tokens)) == 0

    @property
    def why(self) -> str:
        return str(call("why", self.pointer).decode())

    def save(self) -> str:
        """Empty, or the reason why it failed."""
        error = ctypes.create_string_buffer(256)
        return "" if call("save", self.pointer, error, len(error)) else error.value.decode()
