"""Chat templates: programs that come with a model's file, whose author nobody knows.

They are rendered in a process of their own (`template_worker`), in jinja2's sandbox, with an end to
time and memory.  Everything that renders a template does it here: `text.render_chat`, and
`SwiftLlama` with the server on it.
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

from swift_gguf import isolated
from swift_gguf.errors import TemplateError


class ChatTemplate:
    """A template, and the process that renders it, which starts when it is first needed.

    source: Jinja.
    bos_token, eos_token: their text, for the template.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self._source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, **variables: Any) -> str:
        """The prompt; `variables` are what chat templates expect: messages, tools, ...

        Raises:
            TemplateError: the template refuses them, is none, or wants more than it gets.
        """
        values = {"add_generation_prompt": True, **self._tokens, **variables}
        try:
            request = json.dumps({"template": self._source, "variables": values}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"the messages are no JSON: {error}") from error
        if getattr(sys, "frozen", False):
            # an application that carries its Python: its executable runs nothing but itself
            from swift_gguf.template_worker import render

            answer: Mapping[str, str] = render(self._source, json.loads(request)["variables"])
        else:
            with self._lock:
                answer = self._ask(request + b"\n")
        if "text" not in answer:
            raise TemplateError(f"the chat template fails: {answer['error']}")
        return str(answer["text"])

    def _ask(self, request: bytes) -> Mapping[str, str]:
        process = self._running()
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
        try:
            process = subprocess.Popen(
                isolated.command("swift_gguf.template_worker"),
                env=isolated.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the other processes
            )
        except (OSError, ValueError) as error:
            raise TemplateError(f"no process to render chat templates in: {error}") from error
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
