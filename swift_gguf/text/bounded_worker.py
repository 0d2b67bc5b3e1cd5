"""The process in which `bounded` has work done: an end to time and memory, and no files.

Most of what takes for ever or makes text without end happens inside single operations of Python's,
which nothing within a process can break off.  Here the system does: a timer ends the process, and
more memory is not to be had.

Requests and answers are lines of JSON: {"template", "variables"} or {"chat"} (what
`native_chat.analyse` takes), and {"text"} or {"error"}.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any

CPU_S = 2.0
"""Seconds of the processor's for one request; an ordinary one takes thousandths."""
MEMORY = 512 << 20
"""Bytes of addresses, some 50 MB of them Python's own."""


def answer(request: Mapping[str, Any]) -> dict[str, str]:
    """The answer to a request; whatever its text trips over is an error of its own."""
    try:
        return {"text": _work(request)}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MB"}
    except RecursionError:
        return {"error": "it is nested too deep, or calls itself without end"}
    except Exception as error:
        return {"error": " ".join(str(error).split())[:300] or type(error).__name__}


def _work(request: Mapping[str, Any]) -> str:
    if "chat" in request:
        from swift_gguf.native.chat import analyse

        return analyse(request["chat"])
    from swift_gguf.text.template_rendering import render

    return render(request["template"], request["variables"])


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
    _limit_resources()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal ends the process
        said = json.dumps(answer(json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(said + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
