"""Runs each long step of a conversion in a process of its own.

Such a step ends at once on Ctrl-C, and also when the parent is killed.  Its peak memory can be
measured.
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
TAIL = 64 << 10  # bytes of a step's log that are kept


class Report(Protocol):
    """A function that is called with the progress of a step."""

    def __call__(self, what: str, done: int, total: int, unit: str, /) -> None:
        """unit: what `done` and `total` count, such as ``bytes``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Done:
    """The result of a successful step."""

    peak_bytes: int
    """Peak memory, mapped files included."""


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

    grows: the file that the step writes; its size shows the progress.
    expected: that file's approximate final size, in bytes.

    Raises:
        ConvertError: the step failed; the message says why.
    """
    command = isolated("swift_gguf.convert.worker", step)
    pipe = subprocess.PIPE  # the child exits when its standard input closes
    child = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env={**os.environ, **environment}
    )
    log = _Tail(child.stderr)
    try:
        with contextlib.suppress(BrokenPipeError):  # the child has failed; its log says why
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
    """Keeps the end of a process's output, in memory because the disk may be full."""

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
        """The kept output; waits until the process ends."""
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
        "llama.cpp does not know its tokenizer; use the original model's tokenizer files, or a "
        "newer swift-gguf",
    ),
    (
        "< vocab_size",  # the assertion's line in the traceback
        "its tokenizer has more tokens than its embeddings have rows: remove what was added to the "
        "tokenizer, or save the model after resize_token_embeddings",
    ),
)
_OTHER_FORM = (
    "; transformers 5 uses names that llama.cpp's converter does not know: use the original "
    "checkpoint, or save it with transformers 4"
)


def _reason(code: int, text: str, file: Path) -> str:
    """The cause of a failure in one line, from the step's log."""
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
            return f"it was stopped by {failed[0][:300]}"
        return f"it was stopped by signal {number}" + (
            "; the machine has probably run out of memory" if number == 9 else ""
        )
    if code == 1 and not last:
        return "it failed without a message; run it again"
    if missing := re.fullmatch(r"KeyError: (.*)", last):
        if missing[1].startswith("'<"):
            return f"its tokenizer lacks {missing[1]:.100}, which this architecture needs"
        key = missing[1].strip('"').replace("could not find any of: ", "all of ")
        return f"its config.json lacks {key:.200}{_OTHER_FORM}"
    if last.startswith("AssertionError") and len(lines) > 1:  # add the line that failed
        last = f"{last} in `{lines[-2]}`"
    return f"llama.cpp's converter failed: {last[:300]}"
