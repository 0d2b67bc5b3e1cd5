"""Compares the patched library, without a sub-network, with stock llama.cpp: speed and logits.

Two workers, one library each, use `llama_cpp`'s low-level functions alone, so nothing but the
library differs between them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.command import model_parser, positive, tell
from lab.output import write_json
from lab.reference_worker import N_PROMPT
from lab.worker import Worker
from swift_gguf.bench.spread import Spread, table
from swift_gguf.errors import NativeLibraryError, SwiftError
from swift_gguf.hub import models
from swift_gguf.native.load import find_library
from swift_gguf.native.threads import default_threads
from swift_gguf.outputs import require_folder

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path("build") / "reference"
TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class LogitsComparison:
    """Rows of logits of both libraries, compared bit by bit."""

    n_rows: int
    different: tuple[str, ...]
    """The rows that differ: ``prefill 3``, ``single 0``, ``batch of 4, 7``."""

    @property
    def identical(self) -> bool:
        return self.n_rows > 0 and not self.different


@dataclass(frozen=True, kw_only=True)
class ReferenceReport:
    """Speeds of both libraries, measured in turns, and their logits."""

    model: str
    n_threads: int
    rounds: int
    decode_reference: Spread
    """Tokens per second, one value a round; so are the next three."""
    decode_patched: Spread
    prefill_reference: Spread
    prefill_patched: Spread
    decode_ratio: Spread
    """Tokens per second, patched over reference, one value a round."""
    prefill_ratio: Spread
    logits: LogitsComparison

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _open(
    model: Path, lib_dir: Path, *, patched: bool, n_threads: int, n_gpu_layers: int
) -> Worker:
    arguments = [str(model), str(n_threads), str(n_gpu_layers)]
    return Worker("lab.reference_worker", *arguments, lib_dir=lib_dir, patched=patched)


def compare_logits(
    model: Path, patched_lib: Path, reference_lib: Path, *, n_gpu_layers: int = 0
) -> int:
    """Compares rows of logits of the two libraries bit by bit; none may differ.

    Compares rows of a prefill, single tokens and batches of four.  With the same number of threads
    llama.cpp is deterministic, so there is no tolerance.  patched_lib, reference_lib: folders of a
    libllama with and without our patch.

    Raises:
        NativeLibraryError: a folder has no library, or the two are not one of each kind.
        SwiftError: the model cannot be loaded or decoded.
    """
    found = {}
    for patched, lib_dir in ((False, reference_lib), (True, patched_lib)):
        worker = _open(
            model,
            lib_dir,
            patched=patched,
            n_threads=default_threads(),
            n_gpu_layers=n_gpu_layers,
        )
        with worker:
            found[patched] = worker.ask("logits")
    return len(_different(found[False], found[True]).different)


def _different(reference: dict[str, str], patched: dict[str, str]) -> LogitsComparison:
    labels = reference.keys() | patched.keys()
    if not labels:
        raise SwiftError("the workers compared nothing; this is a bug, please report it")
    different = [label for label in labels if reference.get(label) != patched.get(label)]
    return LogitsComparison(n_rows=len(labels), different=tuple(sorted(different)))


def compare(
    model: Path,
    patched_lib: Path,
    reference_lib: Path,
    *,
    rounds: int = 15,
    n_threads: int | None = None,
    n_gpu_layers: int = -1,
    progress: Callable[[str], None] = lambda _: None,
) -> ReferenceReport:
    """Speeds in turns, the order reversed every round, and the logits.

    Raises as `compare_logits` does.
    """
    n_threads = n_threads or default_threads()
    options: dict[str, Any] = {"n_threads": n_threads, "n_gpu_layers": n_gpu_layers}
    with (
        _open(model, reference_lib, patched=False, **options) as reference,
        _open(model, patched_lib, patched=True, **options) as patched,
    ):
        progress("logits")
        logits = _different(reference.ask("logits"), patched.ask("logits"))
        speeds: dict[str, list[float]] = {}
        for number in range(1, rounds + 1):
            progress(f"round {number} of {rounds}")
            workers = [("reference", reference), ("patched", patched)]
            for job, n_tokens in (("prefill", N_PROMPT), ("decode", 1)):
                for name, worker in workers if number % 2 else reversed(workers):
                    seconds = statistics.median(worker.ask(job))
                    speeds.setdefault(f"{job}_{name}", []).append(n_tokens / seconds)
    for job in ("decode", "prefill"):
        speeds[f"{job}_ratio"] = [
            ours / theirs
            for ours, theirs in zip(
                speeds[f"{job}_patched"], speeds[f"{job}_reference"], strict=True
            )
        ]
    return ReferenceReport(
        model=model.name,
        n_threads=n_threads,
        rounds=rounds,
        logits=logits,
        **{name: Spread.of(values) for name, values in speeds.items()},
    )


def verdict(ratio: Spread, tolerance: float) -> str:
    """Whether a ratio is 1 within the tolerance: ``yes``, ``no``, or ``too noisy to say``.

    Both quartiles decide: yes if both are inside the limits, no if both are outside on one side.
    """
    low, high = 1 - tolerance, 1 + tolerance
    if low <= ratio.q1 and ratio.q3 <= high:
        return "yes"
    if ratio.q3 < low or ratio.q1 > high:
        return "no"
    return "too noisy to say"


def render(report: ReferenceReport) -> str:
    """The report as plain text: median (quartiles)."""
    rows = [
        [name, theirs.text(), ours.text(), ratio.text(4)]
        for name, theirs, ours, ratio in (
            (
                "decode, one token",
                report.decode_reference,
                report.decode_patched,
                report.decode_ratio,
            ),
            (
                f"prefill, {N_PROMPT} tokens",
                report.prefill_reference,
                report.prefill_patched,
                report.prefill_ratio,
            ),
        )
    ]
    logits = report.logits
    n_same = logits.n_rows - len(logits.different)
    lines = [
        f"{report.model}, {report.n_threads} threads, {report.rounds} rounds; median (quartiles)",
        "",
        table(["", "unpatched tok/s", "patched tok/s", "patched / unpatched"], rows),
        "",
        f"{n_same} of {logits.n_rows} rows of logits are bit-identical",
    ]
    if logits.different:
        lines.append("different: " + "; ".join(logits.different))
    return "\n".join(lines)


def build_reference() -> Path:
    """llama.cpp without our patch, in build/reference/lib; instant if it is there already."""
    jobs = str(os.cpu_count() or 2)
    configure = ["cmake", "-S", ".", "-B", str(BUILD), "-DSWIFT_GGUF_REFERENCE=ON"]
    python = f"-DPython3_EXECUTABLE={sys.executable}"
    for command in (
        [*configure, python],
        ["cmake", "--build", str(BUILD), "--target", "swift_gguf", "--parallel", jobs],
    ):
        try:
            # standard output is for the report
            subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        except FileNotFoundError:
            raise NativeLibraryError(
                "cmake is not installed; install it (pip install cmake)"
            ) from None
        except subprocess.CalledProcessError:
            raise NativeLibraryError(f"{' '.join(command)} failed, see above") from None
    return ROOT / BUILD / "lib"


def main(arguments: Sequence[str]) -> int:
    parser = model_parser("reference", __doc__)
    parser.add_argument(
        "--reference-lib",
        type=Path,
        metavar="DIR",
        help="a folder with an unpatched libllama (default: build it)",
    )
    parser.add_argument(
        "--patched-lib", type=Path, metavar="DIR", help="default: the package's own"
    )
    parser.add_argument("--rounds", type=positive, default=15, metavar="N")
    args = parser.parse_args(arguments)
    require_folder(args.json)
    report = compare(
        models.resolve(args.model),
        args.patched_lib or find_library(),
        args.reference_lib or build_reference(),
        rounds=args.rounds,
        n_threads=args.threads,
        n_gpu_layers=args.n_gpu_layers,
        progress=tell,
    )
    if args.json:
        write_json(args.json, report.as_dict())
    print(render(report))
    for what, ratio in (("decode", report.decode_ratio), ("prefill", report.prefill_ratio)):
        print(f"{what} within {TOLERANCE:.0%} of unpatched llama.cpp: {verdict(ratio, TOLERANCE)}")
    return 0 if report.logits.identical else 1
