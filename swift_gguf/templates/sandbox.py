"""Runs functions of ours on what strangers wrote, in a process with an end to time and memory.

Most of what takes for ever, or makes text without end, happens inside single operations of
Python's, which nothing within a process can break off.  Here the system does: a timer ends the
process, and more memory is not to be had.  The process sees no files.

Requests are lines of JSON, the function's keywords; answers are {"text"} or {"error"}.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

CPU_S = 2.0
"""Seconds of the processor's for one request; an ordinary one takes thousandths."""
MEMORY = 512 << 20
"""Bytes of addresses, some 50 MB of them Python's own."""

# `-m` and `-c` would put the working directory first, and a json.py there would be run
_START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def command(module: str, *arguments: str) -> list[str]:
    """Runs `module` as `python -m` does, but with this process's search path, and with nothing of
    the folder that one happens to be in."""
    return [sys.executable, "-I", "-c", _START, json.dumps(sys.path), module, *arguments]


def environment() -> dict[str, str]:
    """For a process with little memory: what a user preloads (an allocator, a sanitizer) may need
    more addresses than it gets."""
    preloads = ("LD_PRELOAD", "DYLD_INSERT_LIBRARIES")
    return {name: value for name, value in os.environ.items() if name not in preloads}


class Sandbox:
    """Asks a process for what a function returns.  It starts when it is needed, and anew after it
    was ended.

    Threads may share one; they wait for each other.

    module, function: a function that takes keywords which JSON can carry, and returns text.
    """

    def __init__(self, module: str, function: str) -> None:
        self._module, self._function = module, function
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, **arguments: Any) -> Mapping[str, str]:
        """{"text": ...}, or {"error": ...} in one line: also where it takes more than it gets.

        Raises:
            TypeError, ValueError, RecursionError: the arguments are no JSON.
        """
        line = json.dumps(arguments).encode()
        if getattr(sys, "frozen", False):
            # an application that carries its Python: its executable runs nothing but itself
            return _answer(_find(self._module, self._function), json.loads(line))
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
            command(__name__, self._module, self._function),
            env=environment(),
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


# -- in the process --------------------------------------------------------------------------------


def _find(module: str, function: str) -> Callable[..., str]:
    found: Callable[..., str] = getattr(import_module(module), function)
    return found


def _answer(function: Callable[..., str], arguments: Mapping[str, Any]) -> dict[str, str]:
    """Whatever the function trips over is an error of its own."""
    try:
        return {"text": function(**arguments)}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MB"}
    except RecursionError:
        return {"error": "it is nested too deep, or calls itself without end"}
    except Exception as error:
        return {"error": " ".join(str(error).split())[:300] or type(error).__name__}


def _limit_resources() -> None:
    """For good: what comes later starts with what this leaves."""
    for name, value in (("AS", MEMORY), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)):
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


def main() -> None:
    """Answers requests until there are no more."""
    function = _find(*sys.argv[1:])
    _limit_resources()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal ends the process
        said = json.dumps(_answer(function, json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(said + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
