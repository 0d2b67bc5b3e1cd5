#!/usr/bin/env python3
"""Feeds damaged models and sidecars to the commands: no signal, no flood of memory, one line each.

Every case is a file that a named corruption, flipped bits or a cut made of a good generated model,
and a command that meets it in a process of its own.  A case depends on the seed and its number
alone: `--seed S --first N --count 1` repeats it.

The processes are forks of this one, which has imported everything and computed nothing: thousands
take minutes.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's threads would not outlive a fork

import argparse
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# tests/ is not installed with the package
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from swift_gguf.learning.profile import EMBEDDED
from tests.fixtures.corrupt import damage, flipped, truncated, with_chat_template, with_text
from tests.fixtures.tiny_gguf import write_tiny

LIMIT_S = 60
SLACK = 16 << 20
"""Bytes of memory beyond what the intact file and the damaged file's own size explain."""

_FEW = ("-c", "128", "-ngl", "0", "-t", "1")
COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "info": lambda path: ["info", path],
    "generate": lambda path: ["generate", path, "-p", "hello", "--raw", "-n", "8", *_FEW],
    "layer-skip": lambda path: ["generate", path, "-p", "hello", "--raw", "-n", "8", *_FEW,
                                "--speculation", "layer-skip", "--search", "off"],
    "chat": lambda path: ["chat", path, "-n", "4", *_FEW],
    "prepare": lambda path: ["prepare", path, "-o", f"{path}.out", "--tokens", "48", "--tune", "0",
                             "--head", "64", "-ngl", "0", "-t", "1"],
}  # fmt: skip
FAMILIES = ("llama", "qwen3moe", "gemma3", "lfm2", "gpt2", "phi3")
REFUSED = {("qwen3moe", "prepare"), ("lfm2", "prepare"), ("lfm2", "layer-skip")}
"""Commands that do not support the family, even with an intact file."""
SIDECAR = "sidecar"
"""The family of cases with an intact model and a damaged sidecar."""


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    status: int
    """Exit code, or the negative number of a signal."""
    error: str
    """Standard error."""
    peak: int
    """Peak resident bytes, without those that the fork started with."""

    def complaint(self, *, limit: int) -> str:
        """What is wrong; empty if nothing is."""
        said = [line for line in self.error.splitlines() if line.startswith("swift-gguf: ")]
        if self.status not in (0, 1):
            return f"ended with {self.status}"
        if "Traceback" in self.error:
            return "a traceback"
        if self.status == 1 and len(said) != 1:
            return f"{len(said)} lines tell what is wrong"
        if self.peak > limit:
            return f"{self.peak >> 20} MiB, more than {limit >> 20}"
        return ""


def run(arguments: Sequence[str], folder: Path, *, stdin: bytes = b"hello\n") -> Outcome:
    """Runs the command line in a fork of this process."""
    given, error = folder / "stdin", folder / "stderr"
    given.write_bytes(stdin)
    sys.stdout.flush()
    before = psutil.Process().memory_info().rss  # grows with what earlier cases left here
    child = os.fork()
    if child == 0:
        _become(arguments, given, error)
    _, status, usage = os.wait4(child, 0)
    text = error.read_text("utf-8", "replace") if error.exists() else ""
    return Outcome(os.waitstatus_to_exitcode(status), text, usage.ru_maxrss * 1024 - before)


def _become(arguments: Sequence[str], given: Path, error: Path) -> None:
    """The child's side; does not return."""
    status = 70
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(LIMIT_S)
        os.dup2(os.open(given, os.O_RDONLY), 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (the process's own)
        from swift_gguf.cli import main

        main(list(arguments))
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def warm_up() -> None:
    """Imports the commands' modules, so that the forks need not."""
    from importlib import import_module

    from swift_gguf.native.binding import library

    library()
    for module in ("chat_command", "generate_command", "info_command", "prepare_command"):
        import_module(f"swift_gguf.cli.{module}")
    for module in ("chat.chat", "prepare.run", "session", "speculation", "text", "hub.models"):
        import_module(f"swift_gguf.{module}")


@dataclass(frozen=True)
class Case:
    """A damaged file, and the command that reads it."""

    name: str
    family: str
    command: str
    content: bytes


@dataclass
class Bench:
    """The intact files, and a folder for damaged ones."""

    folder: Path
    good: dict[str, bytes] = field(default_factory=dict)
    base: dict[tuple[str, str], int] = field(default_factory=dict)
    """Peak memory with the intact file, by family and command."""

    def __post_init__(self) -> None:
        os.environ["SWIFT_GGUF_PROFILES"] = str(self.folder / "profiles")

    def content(self, family: str) -> bytes:
        """The bytes of an intact file."""
        if family not in self.good:
            path = self.folder / f"good-{family}.gguf"
            if family == SIDECAR:
                source = self.folder / "model.gguf"
                write_tiny(source, "llama", quant="Q8_0")
                done = run([*COMMANDS["prepare"](str(source)), "-o", str(path)], self.folder)
                assert done.status == 0, done.error
            else:
                write_tiny(path, family)
            self.good[family] = path.read_bytes()
        return self.good[family]

    def run(self, family: str, command: str, content: bytes) -> Outcome:
        """Runs a command on a file with these bytes, or on an intact model with this sidecar."""
        path = self.folder / "model.gguf"
        damaged = path.with_suffix(".swift.gguf") if family == SIDECAR else path
        if family == SIDECAR:
            write_tiny(path, "llama", quant="Q8_0")
        damaged.write_bytes(content)
        try:
            return run(COMMANDS[command](str(path)), self.folder)
        finally:
            for left in (damaged, *self.folder.glob("model.gguf.out*")):
                left.unlink(missing_ok=True)
            shutil.rmtree(self.folder / "profiles", ignore_errors=True)

    def judge(self, case: Case) -> tuple[Outcome, str]:
        """Runs a case; returns how it ended, and what is wrong with that."""
        key = (case.family, case.command)
        if key not in self.base:
            intact = self.run(*key, self.content(case.family))
            assert intact.status == int(key in REFUSED), (key, intact.error)
            self.base[key] = intact.peak
        outcome = self.run(case.family, case.command, case.content)
        limit = self.base[key] + len(case.content) + SLACK
        return outcome, outcome.complaint(limit=limit)


def named(bench: Bench, families: Sequence[str], commands: Sequence[str]) -> Iterator[Case]:
    """Every named corruption, with one of the commands in turn."""
    n = 0
    for family in families:
        content = bench.content(family)
        made = damage(content)
        for name, changed in made.items():
            command = "layer-skip" if family == SIDECAR else commands[n % len(commands)]
            yield Case(f"{family}/{name}", family, command, changed)
            n += 1
        if family != SIDECAR:
            yield from texts(family, content)


def texts(family: str, content: bytes) -> Iterator[Case]:
    """Cases with replaced metadata that a command uses."""
    for i, template in enumerate(("{{ 'a' * 10 ** 10 }}", "{% for %}", "{{ ''.__class__ }}")):
        yield Case(f"{family}/template {i}", family, "chat", with_chat_template(content, template))
    for i, profile in enumerate(("", "[" * 100_000, '{"version": 2}', '{"version": 9e99}', "\0")):
        changed = with_text(content, EMBEDDED, profile)
        yield Case(f"{family}/profile {i}", family, "generate", changed)


def drawn(bench: Bench, seed: int, number: int) -> Case:
    """The case with this number: flipped bits, mostly in the header, or a cut."""
    rng = random.Random(f"{seed}/{number}")
    family = rng.choice((*FAMILIES, SIDECAR))
    content = bench.content(family)
    kind = rng.choices(("header", "anywhere", "cut"), (6, 2, 2))[0]
    if kind == "cut":
        changed = truncated(content, rng)
    else:
        changed = flipped(content, rng, header_only=kind == "header")
    command = "layer-skip" if family == SIDECAR else rng.choice(tuple(COMMANDS))
    return Case(f"seed {seed} number {number} ({family}, {kind})", family, command, changed)


def soak(bench: Bench, cases: Iterator[Case], *, seconds: float = float("inf")) -> Counter[str]:
    """Runs cases and prints what is wrong; counts refused, harmless and wrong ones."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    for case in cases:
        outcome, complaint = bench.judge(case)
        counts["refused" if outcome.status == 1 else "harmless"] += not complaint
        counts["wrong"] += bool(complaint)
        if complaint:
            last = outcome.error.strip().splitlines()[-1:] or [""]
            print(f"{case.name}: {case.command}: {complaint}: {last[0][:300]}", flush=True)
        if time.monotonic() > end:
            break
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first drawn case")
    parser.add_argument("--count", type=int, default=2000, help="drawn cases")
    parser.add_argument("--named", action="store_true", help="every named corruption first")
    parser.add_argument(
        "--families", default=",".join((*FAMILIES, SIDECAR)), help="for the named ones"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end early")
    options = parser.parse_args()
    warm_up()
    start, total = time.monotonic(), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        bench = Bench(Path(folder))
        if options.named:
            cases = named(bench, options.families.split(","), tuple(COMMANDS))
            total += soak(bench, cases, seconds=options.seconds)
        numbers = range(options.first, options.first + options.count)
        left = options.seconds - (time.monotonic() - start)
        total += soak(bench, (drawn(bench, options.seed, n) for n in numbers), seconds=left)
    n = total["refused"] + total["harmless"] + total["wrong"]
    print(
        f"{n} damaged files in {time.monotonic() - start:.0f} s, seed {options.seed}: "
        f"{total['refused']} refused, {total['harmless']} harmless, {total['wrong']} wrong"
    )
    return int(total["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
