"""Runs our functions on untrusted input, in a process with limits of time and memory.

Untrusted input can cause endless loops or endless text inside a single Python operation, which
nothing in the same process can interrupt.  Here the operating system does it: a timer ends the
process, and its memory is limited.  The process cannot write files.

A request is a line of JSON with the function's keyword arguments.  The answer is {"text"} or
{"error"}.
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
"""Seconds of CPU time per request; an ordinary request takes milliseconds."""
MEMORY = 512 << 20
"""Bytes of address space; Python itself uses about 50 MB of them."""

# `-m` and `-c` put the working directory first in the path, and would run a json.py there
_START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def command(module: str, *arguments: str) -> list[str]:
    """A command like `python -m module`, with this process's search path and without the working
    directory."""
    return [sys.executable, "-I", "-c", _START, json.dumps(sys.path), module, *arguments]


def environment() -> dict[str, str]:
    """The environment without preloaded libraries: an allocator or a sanitizer may need more
    address space than the limit."""
    preloads = ("LD_PRELOAD", "DYLD_INSERT_LIBRARIES")
    return {name: value for name, value in os.environ.items() if name not in preloads}


class Sandbox:
    """Calls a function in a process of its own, which starts when needed and restarts after it was
    ended.

    Threads may share a sandbox; they wait for each other.

    module, function: the function; it takes keyword arguments in JSON and returns text.
    """

    def __init__(self, module: str, function: str) -> None:
        self._module, self._function = module, function
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, **arguments: Any) -> Mapping[str, str]:
        """{"text": ...}, or {"error": ...} in one line, also if it exceeds a limit.

        Raises:
            TypeError, ValueError, RecursionError: the arguments cannot be written as JSON.
        """
        line = json.dumps(arguments).encode()
        if getattr(sys, "frozen", False):
            # a frozen application: its executable cannot start another Python program
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
        except BaseException:  # interrupted: the next request must not get this answer
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
        """This process's own sandbox: after a fork, parent and child must not share its pipes."""
        process = self._process
        if process is not None and self._owner == os.getpid() and process.poll() is None:
            return process
        process = subprocess.Popen(
            command(__name__, self._module, self._function),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C does not reach it
        )
        self._process, self._owner = process, os.getpid()
        self._end = weakref.finalize(self, _end, process)
        return process

    def close(self) -> None:
        """Ends the process; a new one starts when needed.  May be called twice."""
        if self._process is not None and self._owner == os.getpid():
            self._end()
        self._process = None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


# -- inside the process ----------------------------------------------------------------------------


def _find(module: str, function: str) -> Callable[..., str]:
    found: Callable[..., str] = getattr(import_module(module), function)
    return found


def _answer(function: Callable[..., str], arguments: Mapping[str, Any]) -> dict[str, str]:
    """The function's result; every exception becomes an {"error": ...}."""
    try:
        return {"text": function(**arguments)}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MB"}
    except RecursionError:
        return {"error": "it is nested too deep, or calls itself without end"}
    except Exception as error:
        return {"error": " ".join(str(error).split())[:300] or type(error).__name__}


def _limit_resources() -> None:
    """Sets limits that cannot be raised again."""
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
