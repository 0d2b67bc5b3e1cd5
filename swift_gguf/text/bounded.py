"""Work on what strangers wrote, in a process of its own with an end to time and memory.

Chat templates are programs (`template_rendering`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from swift_gguf.text import isolated


class Bounded:
    """Asks `bounded_worker`, a process that starts when it is needed, and anew after it was ended.

    Threads may share one; they wait for each other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: Mapping[str, Any]) -> Mapping[str, str]:
        """{"text": ...}, or {"error": ...} in one line: also where it takes more than it gets.

        Raises:
            TypeError, ValueError, RecursionError: the request is no JSON.
        """
        line = json.dumps(request).encode()
        if getattr(sys, "frozen", False):
            # an application that carries its Python: its executable runs nothing but itself
            from swift_gguf.text.bounded_worker import answer

            return answer(json.loads(line))
        with self._lock:
            return self._ask(line + b"\n")

    def _ask(self, request: bytes) -> Mapping[str, str]:
        try:
            process = self._running()
        except (OSError, ValueError) as error:
            return {"error": f"there is no process to run it in: {error}"}
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # interrupted: its answer would be taken for the next one's
            self.close()
            raise
        if line.endswith(b"\n"):
            answer: Mapping[str, str] = json.loads(line)
            return answer
        self.close()
        if process.returncode == -signal.SIGPROF:
            return {"error": "it takes too long"}
        return {"error": f"its process ended ({process.returncode}), likely for want of memory"}

    def _running(self) -> subprocess.Popen[bytes]:
        """A process that is ours: a fork's parent has the same pipes, and must not share them."""
        process = self._process
        if process is not None and self._owner == os.getpid() and process.poll() is None:
            return process
        process = subprocess.Popen(
            isolated.command("swift_gguf.text.bounded_worker"),
            env=isolated.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the other processes
        )
        self._process, self._owner = process, os.getpid()
        self._end = weakref.finalize(self, _end, process)
        return process

    def close(self) -> None:
        """Ends the process; another one starts when it is needed.  Safe to call twice."""
        if self._process is not None and self._owner == os.getpid():
            self._end()
        self._process = None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
