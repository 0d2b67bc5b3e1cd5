"""Our libllama, no sub-network set, against the same llama.cpp without our patch.

Two workers, one library each, speak JSON lines over pipes.  Both use `llama_cpp`'s low-level
functions alone, so nothing but the library differs between them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

from swift_gguf.bench.spread import Spread, table
from swift_gguf.errors import NativeLibraryError, SwiftError
from swift_gguf.templates.sandbox import command as isolated

N_PROMPT = 256
"""Tokens of the timed prefill, and the context length of timed decoding."""
N_DECODE = 8
"""Single tokens decoded in one go."""
N_CTX = 512
# What is compared bit by bit: so many rows of a prefill, single tokens, and batches of 4.
LOGIT_PREFILL = 64
LOGIT_PREFILL_ROWS = 16
LOGIT_SINGLES = 16
LOGIT_BATCHES = 8
LOGIT_WIDTH = 4


# -- the parent's side -----------------------------------------------------------------------------


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


class Worker:
    """A process that has one of the libraries and a model loaded.

    Raises:
        NativeLibraryError: the folder has no library, or of the other kind than `patched` says.
        SwiftError: the model cannot be loaded or decoded.
    """

    def __init__(
        self,
        model: Path,
        lib_dir: Path,
        *,
        patched: bool,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
    ) -> None:
        if not any(lib_dir.glob("*llama.*")):
            raise NativeLibraryError(
                f"there is no libllama in {lib_dir}; build it, or give another folder"
            )
        env = os.environ | {"LLAMA_CPP_LIB_PATH": str(lib_dir.resolve())}
        arguments = [str(model), str(n_threads or 0), str(n_gpu_layers)]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (until `close`)
        self._process = subprocess.Popen(
            isolated("swift_gguf.bench.reference", *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=env,
        )
        try:
            hello = self._answer()
            if hello["patched"] != patched:
                kind = "holds" if hello["patched"] else "lacks"
                raise NativeLibraryError(
                    f"the library in {lib_dir} {kind} swift-gguf's patch; give the other"
                )
        except BaseException:
            self.close()
            raise
        self.n_threads: int = hello["n_threads"]

    def ask(self, job: str) -> Any:
        """The result of a job: ``logits``, ``decode`` or ``prefill``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"job": job}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its answer, or the lack of one, says why
        return self._answer()["result"]

    def _answer(self) -> dict[str, Any]:
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
        return answer

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


def compare_logits(
    model: Path, patched_lib: Path, reference_lib: Path, *, n_gpu_layers: int = 0
) -> int:
    """How many rows of logits differ, bit by bit, between the two libraries: 0 is as it must be.

    Compares rows of a prefill, single tokens and batches of four.  With the same number of threads
    llama.cpp is deterministic, so there is no tolerance.  patched_lib, reference_lib: folders of a
    libllama with and without our patch.

    Raises:
        NativeLibraryError: a folder has no library, or the two are not one of each kind.
        SwiftError: the model cannot be loaded or decoded.
    """
    found = {}
    for patched, lib_dir in ((False, reference_lib), (True, patched_lib)):
        with Worker(model, lib_dir, patched=patched, n_gpu_layers=n_gpu_layers) as worker:
            found[patched] = worker.ask("logits")
    return len(_different(found[False], found[True]).different)


def _different(reference: dict[str, str], patched: dict[str, str]) -> LogitsComparison:
    labels = reference.keys() | patched.keys()
    if not labels:
        raise SwiftError("the workers compared nothing; that is a fault of swift-gguf, report it")
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
    options: dict[str, Any] = {"n_threads": n_threads, "n_gpu_layers": n_gpu_layers}
    with (
        Worker(model, reference_lib, patched=False, **options) as reference,
        Worker(model, patched_lib, patched=True, **options) as patched,
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
        n_threads = patched.n_threads
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


# -- the worker's side -----------------------------------------------------------------------------


class _Decoder:
    """llama.cpp's own API and nothing else."""

    def __init__(self, path: str, n_threads: int, n_gpu_layers: int) -> None:
        # Here, not above: the parent must not load a library of its own.
        import llama_cpp.llama_cpp as api

        self._api = api
        self._log = api.llama_log_callback(lambda level, text, _: None)
        api.llama_log_set(self._log, ctypes.c_void_p(0))
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = n_gpu_layers
        model = api.llama_model_load_from_file(path.encode(), model_params)
        if not model:
            raise RuntimeError(f"{path} cannot be loaded")
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = N_CTX
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = n_threads
        params.no_perf = True
        self._ctx = api.llama_init_from_model(model, params)
        if not self._ctx:
            raise RuntimeError(f"{path}: no context")
        self._memory = api.llama_get_memory(self._ctx)
        self._n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_batch_init(N_CTX, 0, 1)
        self._n_past = 0

    def hello(self, n_threads: int) -> dict[str, Any]:
        patched = hasattr(self._api._lib, "swift_gguf_abi")
        return {"patched": patched, "n_threads": n_threads}

    def _restart(self) -> None:
        self._api.llama_memory_clear(self._memory, True)
        self._n_past = 0

    def _decode(self, n_tokens: int, n_rows: int) -> list[int]:
        """Decodes fixed tokens, the last n_rows with logits; the rows' indices."""
        batch = self._batch
        batch.n_tokens = n_tokens
        for i in range(n_tokens):
            position = self._n_past + i
            batch.token[i] = 7919 * position % self._n_vocab
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= n_tokens - n_rows
        if code := self._api.llama_decode(self._ctx, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        self._n_past += n_tokens
        return list(range(n_tokens - n_rows, n_tokens))

    def _hash(self, row: int) -> str:
        pointer = self._api.llama_get_logits_ith(self._ctx, row)
        return hashlib.sha256(ctypes.string_at(pointer, 4 * self._n_vocab)).hexdigest()

    def logits(self) -> dict[str, str]:
        """sha256 of the float32 bytes of each row, by what the row is."""
        self._restart()
        rows = self._decode(LOGIT_PREFILL, LOGIT_PREFILL_ROWS)
        found = {f"prefill {row}": self._hash(row) for row in rows}
        for i in range(LOGIT_SINGLES):
            (row,) = self._decode(1, 1)
            found[f"single {i}"] = self._hash(row)
        for i in range(LOGIT_BATCHES):
            for row in self._decode(LOGIT_WIDTH, LOGIT_WIDTH):
                found[f"batch of {LOGIT_WIDTH}, {LOGIT_WIDTH * i + row}"] = self._hash(row)
        return found

    def prefill(self) -> list[float]:
        """Seconds of a prefill of N_PROMPT tokens."""
        self._restart()
        return [self._timed(N_PROMPT)]

    def decode(self) -> list[float]:
        """Seconds of each of N_DECODE single tokens after N_PROMPT others."""
        if not N_PROMPT <= self._n_past < N_CTX - N_DECODE:
            self.prefill()
        self._decode(1, 1)  # builds the graph
        return [self._timed(1) for _ in range(N_DECODE)]

    def _timed(self, n_tokens: int) -> float:
        start = perf_counter()
        self._decode(n_tokens, 1)
        self._api.llama_synchronize(self._ctx)
        return perf_counter() - start


def _work(model: str, n_threads: int, n_gpu_layers: int) -> None:
    """Answers jobs until standard input ends."""

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), flush=True)

    try:
        if not n_threads:
            from swift_gguf.native.threads import default_threads

            n_threads = default_threads()
        decoder = _Decoder(model, n_threads, n_gpu_layers)
        say(decoder.hello(n_threads))
        for line in sys.stdin:
            job = json.loads(line)["job"]
            say(
                {
                    "result": {
                        "logits": decoder.logits,
                        "decode": decoder.decode,
                        "prefill": decoder.prefill,
                    }[job]()
                }
            )
    except (RuntimeError, OSError, AttributeError) as error:
        say({"error": str(error)})


if __name__ == "__main__":
    _work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
