"""Steps that take minutes, in processes of their own: what they say of themselves, and what is left
when they end.

A step that runs in a process of its own ends at once when its parent is told to (Ctrl-C), and with
it if the parent is killed; its memory is its own and can be told.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from swift_gguf.errors import ConvertError
from swift_gguf.templates.sandbox import command as isolated

POLL = 0.1  # seconds
TAIL = 64 << 10  # bytes of what a step wrote that are kept


class Report(Protocol):
    """Hears how far a step has come."""

    def __call__(self, what: str, done: int, total: int, unit: str, /) -> None:
        """unit: ``bytes``, or what else is counted."""
        ...


@dataclass(frozen=True, kw_only=True)
class Done:
    """A step that ended well."""

    peak_bytes: int
    """Memory at its highest, mapped files included."""


def run(
    step: str,
    job: Mapping[str, Any],
    *,
    what: str,
    grows: Path,
    expected: int,
    environment: Mapping[str, str],
    report: Report,
) -> Done:
    """Runs a step of `worker`.

    grows: the file that the step writes, by whose size one can tell how far it is.
    expected: that file's size in the end, nearly.

    Raises:
        ConvertError: the step failed; the message says why.
    """
    command = isolated("swift_gguf.convert.worker", step)
    pipe = subprocess.PIPE  # of standard input: its end tells the child that we are gone
    child = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env={**os.environ, **environment}
    )
    log = _Tail(child.stderr)
    try:
        with contextlib.suppress(BrokenPipeError):  # the child says why
            assert child.stdin is not None
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()
        while _is_running(child):
            size = grows.stat().st_size if grows.exists() else 0
            report(what, min(size, expected), expected, "bytes")
        assert child.stdout is not None
        answer = child.stdout.read()
    finally:
        child.kill()
        child.wait()
        said = log.text()
        for stream in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]
    if child.returncode != 0:
        raise ConvertError(_reason(child.returncode, said, grows))
    report(what, expected, expected, "bytes")
    return Done(peak_bytes=json.loads(answer.splitlines()[-1])["peak_bytes"])


class _Tail:
    """The end of what a process writes; not in a file, since the disk may be what is full."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        assert stream is not None
        self._stream, self._kept = stream, b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._stream:
            while data := os.read(self._stream.fileno(), TAIL):
                self._kept = (self._kept + data)[-TAIL:]

    def text(self) -> str:
        """All of it, once the process has ended."""
        self._thread.join()
        return self._kept.decode("utf-8", "replace")


def _is_running(child: subprocess.Popen[bytes]) -> bool:
    try:
        child.wait(POLL)
    except subprocess.TimeoutExpired:
        return True
    return False


_CAUSES = (
    ("No space left on device", "the disk is full: free some space for {folder} and start again"),
    ("Disk quota exceeded", "the quota of {folder} is used up: free some space and start again"),
    ("cannot be written; is the disk full?", "the disk is full: free some space for {folder}"),
    (
        "BPE pre-tokenizer was not recognized",
        "its tokenizer is none that llama.cpp knows; take the original's tokenizer files, or a "
        "newer swift-gguf",
    ),
    (
        "< vocab_size",  # the assertion's line in the traceback
        "its tokenizer has more tokens than its embeddings have rows: remove what was added to the "
        "tokenizer, or save the model after resize_token_embeddings",
    ),
)
_OTHER_FORM = (
    "; transformers 5 writes other names than llama.cpp's converter reads: take the checkpoint as "
    "its makers saved it, or save it with transformers 4"
)


def _reason(code: int, text: str, file: Path) -> str:
    """The one line that matters of a step's log."""
    for sign, cause in _CAUSES:
        if sign in text:
            return cause.format(folder=file.parent.parent)
    # without the marks below a traceback's lines
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^~")]
    last = lines[-1] if lines else ""
    if last.startswith("swift-gguf: "):
        return last.removeprefix("swift-gguf: ")
    if code < 0:
        number = -code
        if failed := re.search(r"GGML_ASSERT\(.*", text):
            return f"it was ended by {failed[0][:300]}"
        return f"it was ended by signal {number}" + (
            ", which is what a machine without memory left does" if number == 9 else ""
        )
    if code == 1 and not last:
        return "it ended without a word; run it again"
    if missing := re.fullmatch(r"KeyError: (.*)", last):
        if missing[1].startswith("'<"):
            return f"its tokenizer lacks {missing[1]:.100}, which a model of its kind has"
        key = missing[1].strip('"').replace("could not find any of: ", "all of ")
        return f"its config.json lacks {key:.200}{_OTHER_FORM}"
    if last.startswith("AssertionError") and len(lines) > 1:  # which says nothing by itself
        last = f"{last} in `{lines[-2]}`"
    return f"llama.cpp's converter failed: {last[:300]}"
