#!/usr/bin/env python3
"""Presses Ctrl-C in every command at random moments, and looks at what is left behind.

Each must end within 5 s with exit code 130 (or have been done already), say nothing of its insides,
leave no half file under a final name, and give the terminal back as it was.  Moments are drawn from
the seed; what a command is doing then is the machine's to say.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# tests/ is not installed with the package
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from swift_gguf.gguf import header as gguf_header
from tests.fixtures.tiny_gguf import write_tiny

COMMAND = [sys.executable, "-m", "swift_gguf"]
PROMPT_S = 5.0
"""Time for an interrupted command to end, on a busy machine."""
PATIENCE_S = 20.0
"""After this time it is killed."""
HALF = (".tmp", ".part", ".partial")
FEW = ["-t", "1", "-ngl", "0"]
COMMIT = "0" * 40
CHECKPOINT, CONVERTED = "checkpoint", "converted.gguf"
"""Files for `verify`, beside the folders of the runs; they are made once."""


@dataclass(frozen=True)
class Scene:
    """A command to interrupt."""

    arguments: Callable[[Path], list[str]]
    """Arguments for a folder that contains model.gguf."""
    longest_s: float
    """The moment of the interrupt is drawn between 0 and this time, in seconds."""
    stdin: str = ""
    at_terminal: bool = False
    """Run in a terminal of its own, and type Ctrl-C there."""
    leave: str = ""
    """Typed after Ctrl-C, to end an interactive command."""
    number: signal.Signals = signal.SIGINT
    """The signal to send instead of Ctrl-C's."""

    @property
    def codes(self) -> tuple[int, ...]:
        """The allowed exit codes."""
        return (0, 130) if self.number == signal.SIGINT else (0,)


def _model(folder: Path) -> str:
    return str(folder / "model.gguf")


SCENES: dict[str, Scene] = {
    "info": Scene(lambda f: ["info", _model(f), "--costs", *FEW], 1.5),
    "generate": Scene(lambda f: ["generate", _model(f), "-p", "go", "-c", "0", *FEW], 1.5),
    "generate in a terminal": Scene(
        lambda f: ["generate", _model(f), "-p", "go", "-c", "0", *FEW], 1.5, at_terminal=True
    ),
    "chat": Scene(lambda f: ["chat", _model(f), *FEW], 1.5, stdin="go\n" * 200),
    "chat in a terminal": Scene(
        lambda f: ["chat", _model(f), *FEW], 2.5, at_terminal=True, leave="\x04\x04"
    ),
    "tune": Scene(lambda f: ["tune", _model(f), "--minutes", "1", *FEW], 3.0),
    "tune in a terminal": Scene(
        lambda f: ["tune", _model(f), "--minutes", "1", *FEW], 3.0, at_terminal=True
    ),
    "prepare": Scene(lambda f: ["prepare", _model(f), "--tokens", "2000", "--tune", "0.1", *FEW],
                     4.0),
    "prepare in a terminal": Scene(
        lambda f: ["prepare", _model(f), "--tokens", "2000", "--tune", "0.1", *FEW], 4.0,
        at_terminal=True,
    ),
    "bench": Scene(
        lambda f: ["bench", _model(f), "--suite", str(f / "suite.jsonl"), "--json",
                   str(f / "bench.json"), *FEW], 4.0,
    ),
    "serve": Scene(lambda f: ["serve", _model(f), "--port", "0", *FEW], 3.0),
    "serve told to end": Scene(
        lambda f: ["serve", _model(f), "--port", "0", *FEW], 3.0, number=signal.SIGTERM
    ),
    "verify": Scene(
        lambda f: ["verify", str(f.parent / CHECKPOINT), str(f.parent / CONVERTED), "-t", "1"], 5.0
    ),
    "config": Scene(lambda f: ["config"], 0.12),
    "completion": Scene(lambda f: ["completion", "bash"], 0.12),
    "models": Scene(lambda f: ["models"], 0.12),
    "models pull": Scene(lambda f: ["models", "pull", "hf:owner/repo/model.gguf"], 3.0),
}  # fmt: skip


# -- one run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    code: int
    seconds: float
    """Seconds since Ctrl-C."""
    said: str
    terminal_restored: bool = True


def interrupt(scene: Scene, folder: Path, after_s: float, environment: dict[str, str]) -> Ending:
    """Runs a command, interrupts it after a time, and waits for its end."""
    arguments = [*COMMAND, *scene.arguments(folder)]
    if scene.at_terminal:
        return _at_terminal(scene, arguments, after_s, environment)
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(scene.stdin)
        process.stdin.flush()
    time.sleep(after_s)
    start = time.monotonic()
    process.send_signal(scene.number)
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdin = None
        said = process.communicate(timeout=PATIENCE_S)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1] + "\n(killed: it did not end)"
    return Ending(process.returncode, time.monotonic() - start, said)


def _at_terminal(
    scene: Scene, arguments: list[str], after_s: float, environment: dict[str, str]
) -> Ending:
    leader, follower = pty.openpty()
    before = termios.tcgetattr(follower)
    process = subprocess.Popen(
        arguments,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment | {"TERM": "xterm-256color"},
        preexec_fn=lambda: _own_terminal(follower),
    )
    said: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(leader, said), daemon=True)
    reader.start()
    time.sleep(after_s)
    start = time.monotonic()
    os.write(leader, b"\x03")
    end = start + PATIENCE_S
    while process.poll() is None and time.monotonic() < end:
        if scene.leave:
            with contextlib.suppress(OSError):
                os.write(leader, scene.leave.encode())
        time.sleep(0.1)
    if process.poll() is None:
        process.kill()
        process.wait()
        said.append(b"\n(killed: it did not end)")
    seconds = time.monotonic() - start
    restored = termios.tcgetattr(follower)[:6] == before[:6]
    os.close(follower)
    reader.join(1)
    os.close(leader)
    return Ending(process.returncode, seconds, b"".join(said).decode("utf-8", "replace"), restored)


def _own_terminal(follower: int) -> None:
    import fcntl

    os.setsid()
    fcntl.ioctl(follower, termios.TIOCSCTTY, 0)


def _read_all(leader: int, said: list[bytes]) -> None:
    with contextlib.suppress(OSError):
        while text := os.read(leader, 65_536):
            said.append(text)


def complaint(scene: Scene, ending: Ending, folder: Path) -> str:
    """What is wrong; empty if nothing is."""
    has_begun = re.search(r"swift_gguf/cli/__init__\.py.* in main", ending.said) is not None
    if "Traceback" in ending.said and has_begun:
        return "a traceback"
    # torch has callbacks for the end of the process, when the command is done
    if re.search("Exception ignored in(?! atexit callback)", ending.said):
        return "an exception in a callback"
    # before, it is Python's own start, or ours of the modules that `main` needs
    is_unborn = not has_begun and (
        ending.code == -scene.number or (ending.code == 1 and "KeyboardInterrupt" in ending.said)
    )
    if ending.code not in scene.codes and not is_unborn:
        return f"exit code {ending.code}"
    if ending.seconds > PROMPT_S:
        return f"took {ending.seconds:.1f} s to end"
    if not ending.terminal_restored:
        return "the terminal is not as it was"
    return half_file(folder)


def half_file(folder: Path) -> str:
    """A file that is not what its name says."""
    for path in folder.rglob("*"):
        if path.name.endswith(HALF):
            return f"left {path.name}"
        try:
            if path.is_file() and path.name.endswith(".gguf"):
                gguf_header.read(path)
            elif path.is_file() and path.suffix == ".json":
                json.loads(path.read_text())
        except ValueError as error:
            return f"{path.name} is no whole file: {error}"
    return ""


# -- a hub to fetch from ---------------------------------------------------------------------------


class _Hub(http.server.BaseHTTPRequestHandler):
    """One repository with one file, which comes slowly."""

    content = b""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path.startswith("/api/"):
            siblings = [{"rfilename": "model.gguf", "size": len(self.content)}]
            body = json.dumps({"id": "owner/repo", "sha": COMMIT, "siblings": siblings}).encode()
        else:
            body = self.content
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"tiny"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(OSError):
                for i in range(0, len(body), len(body) // 8 + 1):
                    self.wfile.write(body[i : i + len(body) // 8 + 1])
                    time.sleep(0.1 * (body is self.content))


@contextlib.contextmanager
def hub(content: bytes) -> Iterator[str]:
    """Its address."""
    handler = type("Handler", (_Hub,), {"content": content})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# -- a checkpoint to verify with -------------------------------------------------------------------


def write_checkpoint(home: Path) -> None:
    """A tiny one, and its GGUF."""
    # torch takes seconds, and only `verify` needs it
    from tests.convert import checkpoints
    from tests.convert.conftest import convert

    tokenizer = checkpoints.spm_tokenizer(home / "tokenizer")
    folder = checkpoints.make("llama-spm", home / CHECKPOINT, tokenizer=tokenizer)
    convert(folder, home / CONVERTED)


# -- the soak --------------------------------------------------------------------------------------


def soak(
    *, seed: int, numbers: range, names: list[str], tell: Callable[[str], None] = print
) -> dict[str, list[Ending]]:
    """How the runs ended, by command; tells what is wrong."""
    ended: dict[str, list[Ending]] = {name: [] for name in names}
    # a shell without job control starts background jobs with Ctrl-C ignored; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="signals-") as home:
        good = write_tiny(Path(home) / "good.gguf", "llama", quant="Q8_0", n_ctx=65_536)
        if "verify" in names:
            write_checkpoint(Path(home))
        with hub(good.read_bytes()) as address:
            for number in numbers:
                name = names[number % len(names)]
                rng = random.Random(f"{seed}/{number}")
                folder = Path(home) / str(number)
                folder.mkdir()
                (folder / "model.gguf").write_bytes(good.read_bytes())
                rows = [
                    {"category": "c", "question_id": i, "turns": [f"Tell me {i} stories."]}
                    for i in range(40)
                ]
                (folder / "suite.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
                environment = os.environ | {
                    "SWIFT_GGUF_CACHE": str(folder / "cache"),
                    "SWIFT_GGUF_PROFILES": str(folder / "profiles"),
                    "HF_ENDPOINT": address,
                    "HF_HOME": str(folder / "hub"),
                    "HF_HUB_DISABLE_XET": "1",
                }
                scene = SCENES[name]
                after_s = rng.uniform(0, scene.longest_s)
                ending = interrupt(scene, folder, after_s, environment)
                ended[name].append(ending)
                if wrong := complaint(scene, ending, folder):
                    tell(
                        f"seed {seed} number {number}: {name}, interrupted after {after_s:.2f} s: "
                        f"{wrong} (exit code {ending.code})\n{ending.said[-1500:]}"
                    )
    return ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=10 * len(SCENES), help="runs")
    parser.add_argument("--only", choices=list(SCENES), help="this command")
    options = parser.parse_args()
    wrong: list[str] = []

    def tell(text: str) -> None:
        wrong.append(text)
        print(text, flush=True)

    names = [options.only] if options.only else list(SCENES)
    numbers = range(options.first, options.first + options.count)
    ended = soak(seed=options.seed, numbers=numbers, names=names, tell=tell)
    for name, endings in ended.items():
        if endings:
            cut = sum(ending.code != 0 for ending in endings)
            slowest = max(ending.seconds for ending in endings)
            print(
                f"{name:24} {len(endings):3} times, {cut:3} of them cut short, "
                f"at most {slowest:.2f} s to the end"
            )
    print(f"{options.count} interrupts, seed {options.seed}: {len(wrong)} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
