"""A process of its own with a library of llama.cpp and a model: it answers jobs, one at a time.

Both sides speak JSON lines over pipes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from swift_gguf.errors import NativeLibraryError, SwiftError
from swift_gguf.templates.sandbox import command

Jobs = Mapping[str, Callable[..., Any]]


class Worker:
    """The parent's side.

    module: of the lab; as `__main__` it calls `work`.
    lib_dir: a folder with a libllama.
    patched: whether that one has our patch.

    Raises:
        NativeLibraryError: the folder has no library, or of the other kind than `patched` says.
        SwiftError: the worker cannot load the model.
    """

    def __init__(self, module: str, *arguments: str, lib_dir: Path, patched: bool) -> None:
        if not any(lib_dir.glob("*llama.*")):
            raise NativeLibraryError(
                f"there is no libllama in {lib_dir}; build it, or give another folder"
            )
        folder = str(lib_dir.resolve())
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (until `close`)
        self._process = subprocess.Popen(
            command(module, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"LLAMA_CPP_LIB_PATH": folder, "SWIFT_GGUF_LIB_DIR": folder},
        )
        try:
            if self._answer() != patched:
                kind = "lacks" if patched else "holds"
                raise NativeLibraryError(
                    f"the library in {lib_dir} {kind} swift-gguf's patch; give the other"
                )
        except BaseException:
            self.close()
            raise

    def ask(self, job: str, *arguments: Any) -> Any:
        """What the worker's function of that name returns.

        Raises:
            SwiftError: it failed, or the worker died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([job, *arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its answer, or the lack of one, says why
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
            raise SwiftError(f"a worker died (code {code}): {lines[-1] if lines else 'no message'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SwiftError(f"a worker failed: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Ends the process; safe to call twice."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def work(load: Callable[[], Jobs]) -> None:
    """The child's side: loads a model, and answers jobs until standard input ends."""

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), flush=True)

    try:
        jobs = load()
        import llama_cpp.llama_cpp as api  # only now: whoever loads it first chooses the library

        say({"result": hasattr(api._lib, "swift_gguf_abi")})
        for line in sys.stdin:
            job, *arguments = json.loads(line)
            say({"result": jobs[job](*arguments)})
    except (SwiftError, RuntimeError, OSError, ValueError, AttributeError) as error:
        say({"error": str(error)})
