#!/usr/bin/env python3
"""Makes .venv with swift-gguf in it, built from the pinned llama.cpp; `make` runs this first.

Does only what is missing, and prints nothing if nothing is.  CMAKE_ARGS goes to our build (e.g.
CMAKE_ARGS=-DGGML_CUDA=ON) and is remembered, so that later runs need not repeat it.

The syntax stays that of Python 3.6, so that an old Python can say what it lacks.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from io import FileIO
from pathlib import Path
from typing import Any, Iterator

if sys.version_info < (3, 10):
    sys.exit(
        "swift-gguf needs Python 3.10 or newer; this is {}.{}: install one and name it, "
        "e.g. make PYTHON=python3.12".format(*sys.version_info)
    )
if os.name != "posix":
    sys.exit("swift-gguf builds on Linux and macOS; on Windows use WSL")

import fcntl

ROOT = Path(__file__).resolve().parent.parent
LOG = "bootstrap.log"
STATE = "bootstrap.json"
EXTRAS = ("", "dev", "test")  # of pyproject.toml, each with what the one before has
BINDINGS_ARGS = "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"  # llama-cpp-python without its own libllama

# What a tool's output holds -> the cause in a line; the first that matches.  A group is the line.
CAUSES = (
    (r"No space left on device|Errno (?:28|122)\]", "the disk is full; free about 2 GB"),
    (
        r"Killed signal terminated program",
        "the compiler ran out of memory; try again with CMAKE_BUILD_PARALLEL_LEVEL=1",
    ),
    (r"^[ ]*swift-gguf: (.+(?:\n[ ]+\S.*)*)", None),  # native/source.py; CMake wraps its lines
    (r"^[ ]*(\S+:\d+:(?:\d+:)? (?:fatal )?error: .+)", None),
    (r"^[ ]*(.*undefined reference to.*)", None),
    (r"^[ ]*(CMake Error.*(?:\n(?:[ ]*\n)?[ ]+\S.*)*)", None),
    (r"CERTIFICATE_VERIFY_FAILED", "the package index's certificate is not trusted; set PIP_CERT"),
    (
        r"connection broken by|ConnectionError|Max retries exceeded|[Tt]imed out",
        "no connection to the package index; check the network and pip's settings, then try again",
    ),
    (r"^ERROR: (?!Failed to build|Could not build)(.+)", None),
)


class Failure(Exception):
    """An error, in one line."""


def cause(output: str) -> str:
    """The line of a failed tool's output that names the cause."""
    for pattern, text in CAUSES:
        match = re.search(pattern, output, re.MULTILINE)
        if match:
            text = " ".join((text or match.group(1)).split())
            return text if len(text) <= 400 else text[:397] + "..."
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:400] if lines else "no reason given"


# -- what this machine must have -------------------------------------------------------------------


def hint(debian: str, macos: str) -> str:
    return macos if sys.platform == "darwin" else debian


def check_machine() -> None:
    # CMake is not looked for: where it is missing or too old, the build takes it from PyPI.
    try:
        import ensurepip
        import venv

        del ensurepip, venv
    except ImportError:
        package = "python{}.{}-venv".format(*sys.version_info)
        raise Failure(
            "this Python cannot make virtual environments; install its venv module "
            f"(Debian: apt install {package})"
        ) from None
    if sys.platform == "darwin" and quiet("xcode-select", "-p") is None:
        raise Failure("no C++ compiler; install one: xcode-select --install")
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    if not any(name and shutil.which(name.split()[0]) for name in compilers):
        how = hint("Debian: apt install build-essential", "xcode-select --install")
        raise Failure(f"no C++ compiler; install one ({how})")
    if not shutil.which("git"):
        how = hint("Debian: apt install git", "xcode-select --install")
        raise Failure(f"git is needed to patch llama.cpp; install it ({how})")


def quiet(*command: str) -> str | None:
    """The output of a command, None if it fails or does not exist."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


# -- what there is and what there should be --------------------------------------------------------


def found(pattern: str, text: str) -> re.Match[str]:
    match = re.search(pattern, text, re.MULTILINE)
    assert match is not None, pattern
    return match


def pin() -> str:
    """The llama-cpp-python release of native/llama_cpp.pin."""
    text = (ROOT / "native" / "llama_cpp.pin").read_text()
    return found(r"^llama-cpp-python *= *(\S+)", text)[1]


def build_key(cmake_args: str) -> str:
    """A hash of everything the installed package depends on.

    Of Python files their names: an editable install finds by name what it was made with.
    """
    files = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt"]
    for folder, _, names in os.walk(ROOT / "native"):
        files += [Path(folder, name) for name in names]
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.suffix not in (".md", ".pyc"):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    for path in sorted((ROOT / "swift_gguf").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
    own_tree = os.environ.get("SWIFT_LLAMA_CPP_DIR", "")
    digest.update(f"{cmake_args}\0{own_tree}".encode())
    return digest.hexdigest()


def build_tools() -> list[str]:
    """What the build needs.  It lies in .venv, so that building again needs no network."""
    requires = found(r"^requires = (.*)", (ROOT / "pyproject.toml").read_text())
    tools = re.findall(r'"([^"]+)"', requires[1])
    cmake = found(r"(\d+)\.(\d+)", quiet("cmake", "--version") or "0.0")
    if tuple(map(int, cmake.groups())) < (3, 21):
        tools.append("cmake>=3.21")
    if not shutil.which("ninja"):
        tools.append("ninja")
    return tools


def read_state(venv: Path) -> dict[str, Any]:
    """The state that the last run saved; {} if that run did not finish."""
    try:
        state: dict[str, Any] = json.loads((venv / STATE).read_text())
    except (OSError, ValueError):
        return {}
    whole = not state.get("busy") and os.path.exists(venv / "bin" / "python")
    this_python = [sys.implementation.name, *sys.version_info[:2], os.uname().machine]
    return state if whole and state.get("python") == this_python else {}


def is_ready(venv: Path, state: dict[str, Any], key: str, extra: str) -> bool:
    return (
        state.get("key") == key
        and EXTRAS.index(state.get("extra", "")) >= EXTRAS.index(extra)
        # a checkout of the user's own may have changed: only its build knows
        and not os.environ.get("SWIFT_LLAMA_CPP_DIR")
        and has_library(venv)
    )


def has_library(venv: Path) -> bool:
    return any(venv.glob("lib/python3*/site-packages/swift_gguf/lib/*llama.*"))


# -- the steps -------------------------------------------------------------------------------------


class Bootstrap:
    def __init__(self, venv: Path, state: dict[str, Any], log: FileIO) -> None:
        self.venv, self.state, self.log = venv, state, log
        self.python = str(venv / "bin" / "python")
        self.timings: list[dict[str, object]] = []

    @contextlib.contextmanager
    def step(self, name: str, doing: str, note: str = "") -> Iterator[None]:
        live = sys.stdout.isatty()
        if live:
            print(f"  {doing}{note} ...", end="\r", flush=True)
        start = time.perf_counter()
        try:
            yield
        except Failure as error:
            raise Failure(f"{doing}: {error}") from None
        finally:
            if live:
                print("\33[K", end="", flush=True)
        seconds = time.perf_counter() - start
        self.timings.append({"step": name, "seconds": round(seconds, 2)})
        print(f"  {name:<26} {seconds:6.1f} s", flush=True)

    def save(self, **changes: object) -> None:
        self.state.update(changes)
        partial = self.venv / (STATE + ".partial")
        partial.write_text(json.dumps(self.state))
        os.replace(partial, self.venv / STATE)

    def run(self, *command: str, **variables: str) -> str:
        """Run a tool; its output goes to the log and is returned."""
        environment = dict(os.environ, PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
        environment.update(variables, PIP_USER="0", PYTHONNOUSERSITE="1")
        self.log.write("\n$ {}\n".format(" ".join(command)).encode())
        start = self.log.tell()
        process = subprocess.Popen(
            command,
            cwd=str(ROOT),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except BaseException:
            stop(process)  # do not leave compilers running
            raise
        self.log.seek(start)
        output = self.log.read().decode(errors="replace")
        if code != 0:
            if shutil.disk_usage(self.venv).free < 1 << 20:
                output = os.strerror(errno.ENOSPC)  # the log has no room for the reason either
            raise Failure(cause(output))
        return output

    def pip_install(self, *arguments: str, **variables: str) -> None:
        """pip install; if it is cut short while it installs, the next run makes a new .venv."""
        self.save(busy=True)
        before = self.log.seek(0, os.SEEK_END)
        try:
            self.run(self.python, "-m", "pip", "install", *arguments, **variables)
        finally:
            self.log.seek(before)
            if sys.exc_info()[0] is None or b"\nInstalling collected" not in self.log.read():
                self.save(busy=False)

    def make_venv(self) -> None:
        for path in self.venv.iterdir():
            if path.name == LOG:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        # from inside a virtual environment: the Python it was made from, which outlives it
        base = getattr(sys, "_base_executable", None) or sys.executable
        self.run(base, "-m", "venv", str(self.venv))
        machine = os.uname().machine
        self.save(python=[sys.implementation.name, *sys.version_info[:2], machine])

    def install(self, key: str, cmake_args: str, extra: str) -> None:
        if not self.state:
            with self.step("virtual environment made", "making the virtual environment"):
                self.make_venv()
        if self.state.get("bindings") != pin():
            fetching = "fetching the source of llama.cpp"
            with self.step("llama.cpp source fetched", fetching, " (77 MB)"):
                source = str(ROOT / "native" / "source.py")
                archive = self.run(self.python, source, "--fetch-only").splitlines()[-1]
            with self.step("llama_cpp bindings built", "building the llama_cpp bindings"):
                self.pip_install(archive, CMAKE_ARGS=BINDINGS_ARGS)
                self.save(bindings=pin())
        extra = max(extra, self.state.get("extra", ""), key=EXTRAS.index)
        built = self.state.get("key") == key and has_library(self.venv)
        step = ("library built", "building the library", ", minutes the first time")
        if built and not os.environ.get("SWIFT_LLAMA_CPP_DIR"):
            step = ("development tools added", "installing the development tools", "")
        with self.step(*step):
            self.pip_install(*build_tools())
            package = ["-e", f".[{extra}]" if extra else "."]
            self.pip_install("--no-build-isolation", *package, CMAKE_ARGS=cmake_args)
            self.save(key=key, cmake_args=cmake_args, extra=extra)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a tool and all processes that it started."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


# -- the command -----------------------------------------------------------------------------------


SERVER_ARGS = "-DSWIFT_GGUF_SERVER=ON"


def bootstrap(venv: Path, extra: str, server: bool = False) -> list[dict[str, object]]:
    """Bring `venv` up to date; returns the steps it took.

    server: with llama-server, from now on.
    """

    def plan() -> tuple[dict[str, Any], str, str, bool]:
        state = read_state(venv)
        cmake_args = os.environ.get("CMAKE_ARGS", state.get("cmake_args", ""))
        if server and SERVER_ARGS not in cmake_args:
            cmake_args = f"{cmake_args} {SERVER_ARGS}".strip()
        key = build_key(cmake_args)
        return state, cmake_args, key, is_ready(venv, state, key, extra)

    if plan()[-1]:
        return []
    check_machine()
    foreign = venv.exists() and not ((venv / "pyvenv.cfg").exists() or (venv / LOG).exists())
    if foreign and (not venv.is_dir() or any(venv.iterdir())):
        raise Failure(f"{venv} is not a virtual environment; name another folder with --venv")
    venv.mkdir(parents=True, exist_ok=True)
    with (venv / LOG).open("a+b", buffering=0) as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # `make -j` runs several of us
        state, cmake_args, key, ready = plan()
        if ready:
            return []
        log.truncate(0)
        if cmake_args and "CMAKE_ARGS" not in os.environ:
            print(f"  CMAKE_ARGS as before: {cmake_args}")
        work = Bootstrap(venv, state, log)
        work.install(key, cmake_args, extra)
        return work.timings


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_mutually_exclusive_group().add_argument
    for extra, what in (("dev", "the light tools: `make check`"), ("test", "all that tests need")):
        add(f"--{extra}", dest="extra", action="store_const", const=extra, default="", help=what)
    parser.add_argument("--server", action="store_true", help="and llama-server")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="DIR")
    parser.add_argument("--timings", type=Path, metavar="FILE", help="write the durations as JSON")
    options = parser.parse_args()
    venv = Path(os.path.abspath(options.venv))
    log = os.path.relpath(venv / LOG)
    signal.signal(signal.SIGTERM, interrupt)
    start = time.perf_counter()
    try:
        steps = bootstrap(venv, options.extra, options.server)
        if options.timings:
            total = round(time.perf_counter() - start, 2)
            options.timings.write_text(json.dumps({"steps": steps, "seconds": total}) + "\n")
        return 0
    except Failure as error:
        reason = str(error)
    except KeyboardInterrupt:
        reason = "interrupted; run the same command again to go on"
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full; free about 2 GB" if full else str(error)
    if (venv / LOG).exists():
        reason += f" (log: {log})"
    print(f"error: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
