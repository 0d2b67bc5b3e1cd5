"""Steps that take minutes, in processes of their own: what they say of themselves, and what is left
when they end.

A step that runs in a process of its own ends at once when its parent is told to (Ctrl-C), and with
it if the parent is killed; its memory is its own and can be told.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from swift_gguf.errors import ConvertError

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
    log = grows.with_name(f"{step}.log")
    command = [sys.executable, "-m", "swift_gguf.convert.worker", step]
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # its end tells the child that we are gone
            stdout=subprocess.PIPE,
            stderr=output,
            env={**os.environ, **environment},
        )
        try:
            assert child.stdin is not None
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            pass  # it says why in its log
        try:
            while _is_running(child):
                size = grows.stat().st_size if grows.exists() else 0
                report(what, min(size, expected), expected, "bytes")
        finally:
            child.kill()
            answer = child.communicate()[0]
    if child.returncode != 0:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            text = file.read().decode("utf-8", "replace")
        raise ConvertError(_reason(child.returncode, text, grows))
    log.unlink()
    report(what, expected, expected, "bytes")
    return Done(peak_bytes=json.loads(answer.splitlines()[-1])["peak_bytes"])


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
)


def _reason(code: int, text: str, file: Path) -> str:
    """The one line that matters of a step's log."""
    for sign, cause in _CAUSES:
        if sign in text:
            return cause.format(folder=file.parent.parent)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if last.startswith("swift-gguf: "):
        return last.removeprefix("swift-gguf: ")
    if code < 0:
        number = -code
        return f"it was ended by signal {number}" + (
            ", which is what a machine without memory left does" if number == 9 else ""
        )
    if code == 1 and not last:
        return "it ended without a word; run it again"
    return f"llama.cpp's converter failed: {last[:300]}"
