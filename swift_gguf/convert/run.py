"""A conversion: its steps, and how an interrupted one resumes.

Unfinished files are in the folder ``MODEL.gguf.convert`` beside the model.  It is deleted when the
model is complete.  The name of each file there contains a hash of all its inputs, so a later run
reuses a file only if its inputs are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from swift_gguf.convert import converter, imatrix, steps
from swift_gguf.convert.checkpoint import Checkpoint
from swift_gguf.convert.embed import embed
from swift_gguf.convert.marks import without_marks
from swift_gguf.convert.plan import OUTTYPES, SIDECAR_SHARE, Plan, expected_bytes
from swift_gguf.convert.steps import Report
from swift_gguf.errors import ConvertError, ModelError
from swift_gguf.gguf.identity import fingerprint
from swift_gguf.native import library
from swift_gguf.native.convert import Quantization

SUFFIX = ".convert"
N_TOKENS = 6000
LOCK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How to convert a checkpoint.

    Raises:
        ConvertError: the options do not fit together.
    """

    quantization: Quantization | None = None
    """None: the unquantised intermediate is the model."""
    outtype: str = "bf16"
    """The type of the intermediate, one of `plan.OUTTYPES`."""
    imatrix: Path | None = None
    auto_imatrix: bool = False
    """Compute an importance matrix on the model's own answers."""
    calibration_tokens: int = N_TOKENS
    """The length of these answers, in tokens."""
    keep_intermediate: bool = False
    name: str | None = None
    """general.name; None: the converter chooses it."""
    prepares: bool = False
    """True if the disk needs room for a sidecar, too."""
    embeds: bool = False
    """True if `Conversion.finish` will add keys."""
    n_threads: int | None = None

    def __post_init__(self) -> None:
        if self.outtype not in OUTTYPES:
            raise ConvertError(f"no type {self.outtype!r:.20}; use one of {', '.join(OUTTYPES)}")
        if (self.imatrix or self.auto_imatrix) and self.quantization is None:
            raise ConvertError("an importance matrix needs --quantize; pass both")
        needs = self.quantization.needs_imatrix if self.quantization else None
        if needs and not (self.imatrix or self.auto_imatrix):
            raise ConvertError(
                f"{needs} needs an importance matrix; pass --imatrix auto, or a file"
            )


class Conversion:
    """Converts a checkpoint to the GGUF `out`.

    Use it as a context manager: only one process at a time may use the folder of unfinished files.

    Raises:
        ConvertError: the converter cannot read the checkpoint, the disk is too small, or another
            process is converting to the same file.
        NativeLibraryError: there is no converter.
    """

    def __init__(self, checkpoint: Checkpoint, out: Path, options: ConvertOptions) -> None:
        self.checkpoint, self.out, self.options = checkpoint, out, options
        self.work = out.with_name(out.name + SUFFIX)
        self.peak_bytes = 0
        """The highest memory use of the steps that ran as processes of their own."""
        self._converter = converter.find()
        converter.require_convertible(checkpoint, self._converter)

    def __enter__(self) -> Conversion:
        import filelock

        if not self.out.parent.is_dir():
            raise ConvertError(f"{self.out.parent}: no such folder; make it, or write elsewhere")
        if self.options.imatrix:
            imatrix.read(self.options.imatrix)  # report errors before hours of work
        self.work.mkdir(exist_ok=True)
        self._lock = filelock.FileLock(self.work / "lock")
        with contextlib.suppress(filelock.Timeout, FileNotFoundError):
            self._lock.acquire(timeout=LOCK_SECONDS)
        # without a lock file, the other process has just finished and deleted the folder
        if not self._lock.is_locked or not (self.work / "lock").exists():
            raise ConvertError(f"another process is converting to {self.out}; wait until it ends")
        try:
            self._tidy()  # before the check: files of a killed run take space
            if not self.is_done:
                self.plan.require_space()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            if not any(path.suffix in (".gguf", ".json") for path in self.work.iterdir()):
                shutil.rmtree(self.work)  # before releasing the lock: another process may wait
        self._lock.release()

    @property
    def is_done(self) -> bool:
        """True if an earlier run with the same options wrote `out` but did not reach `forget`."""
        try:
            return bool(json.loads(self._done.read_text()) == self._made())
        except (OSError, ValueError, ModelError):
            return False

    def _made(self) -> list[object]:
        """Identifies the final file and the options that made it."""
        options = self.options
        wishes = [options.embeds, options.keep_intermediate]
        return [self._model.name, fingerprint(self.out), *wishes]

    @property
    def _done(self) -> Path:
        return self.work / "done.json"

    def forget(self) -> None:
        """Marks the whole command as done: the next run starts from the beginning."""
        self._done.unlink(missing_ok=True)

    # -- files -------------------------------------------------------------------------------------

    @property
    def kept(self) -> Path | None:
        """The path where the intermediate is kept; None if it is deleted."""
        if not (self.options.keep_intermediate and self.options.quantization):
            return None
        return self.out.with_name(f"{self.out.stem}.{self.options.outtype}.gguf")

    @cached_property
    def plan(self) -> Plan:
        options, kind = self.options, OUTTYPES[self.options.outtype]
        quantization = options.quantization
        intermediate = expected_bytes(self.checkpoint, kind)
        model = expected_bytes(self.checkpoint, quantization.name) if quantization else intermediate
        return Plan(
            intermediate=intermediate,
            model=model,
            sidecar=round(SIDECAR_SHARE * model) if options.prepares else 0,
            folder=self.out.parent,
            has_intermediate=self._intermediate.exists() or self._model.exists(),
            has_model=self._model.exists(),
            quantizes=quantization is not None,
            copies=options.embeds,
        )

    @cached_property
    def _intermediate(self) -> Path:
        found, options = self.checkpoint, self.options
        source = [found.key, found.trusts_code, options.outtype, options.name]
        return self._named("intermediate", [*source, library().llama_commit])

    @cached_property
    def _matrix(self) -> Path:
        return self._named("imatrix", [self._intermediate.name, self.options.calibration_tokens])

    @cached_property
    def _model(self) -> Path:
        quantization = self.options.quantization
        if quantization is None:
            return self._intermediate
        matrix: object = self._matrix.name if self.options.auto_imatrix else None
        if self.options.imatrix:
            stat = self.options.imatrix.stat()
            matrix = [str(self.options.imatrix.resolve()), stat.st_size, stat.st_mtime_ns]
        fields = dataclasses.asdict(quantization)
        return self._named("quantized", [self._intermediate.name, fields, matrix])

    def _named(self, what: str, made_from: object) -> Path:
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        return self.work / f"{what}-{digest[:16]}.gguf"

    def _tidy(self) -> None:
        """Removes the files of killed runs and of runs with other options."""
        wanted = {self._intermediate, self._matrix, self._model}
        for path in self.work.iterdir():
            if path.name != "lock" and path.suffix != ".json" and path not in wanted:
                path.unlink()

    # -- steps -------------------------------------------------------------------------------------

    def run(self, report: Report = lambda *_: None) -> Path:
        """Runs all steps; returns the model's path in the folder of unfinished files.

        Raises:
            ConvertError: a step failed, or llama.cpp cannot run its result.
        """
        options = self.options
        if not self._model.exists():
            if not self._intermediate.exists():
                self._convert(report)
            if options.quantization:
                if options.auto_imatrix and not self._matrix.exists():
                    self._weigh(report)
                self._quantize(options.quantization, report)
        return self._model

    def finish(self, keys: Mapping[str, str]) -> None:
        """Adds `keys` to the model's metadata and moves it to `out`."""
        whole = self._model
        if keys:
            whole = self.work / "whole.gguf"
            with self._making(whole) as part:
                embed(self._model, part, keys)
        if self.kept and self._intermediate.exists():
            os.replace(self._intermediate, self.kept)
        os.replace(whole, self.out)
        _sync(self.out.parent)
        self._done.write_text(json.dumps(self._made()))
        for path in self.work.iterdir():
            if path.name not in ("lock", self._done.name):
                path.unlink()

    def _convert(self, report: Report) -> None:
        converter.require_packages()
        job = {
            "converter": str(self._converter),
            "outtype": self.options.outtype,
            "name": self.options.name,
            "trust_code": self.checkpoint.trusts_code,
        }
        made = self._making(self._intermediate)
        with without_marks(self.checkpoint.folder) as folder, made as part:
            done = steps.run(
                "convert",
                {**job, "folder": str(folder), "out": str(part)},
                what="converting",
                grows=part,
                expected=self.plan.intermediate,
                environment={"HF_HUB_OFFLINE": "1"},  # everything is in the folder
                report=report,
            )
            self._try_out(part, "converting", report)
        self.peak_bytes = max(self.peak_bytes, done.peak_bytes)

    def _weigh(self, report: Report) -> None:
        from swift_gguf.convert import calibrate
        from swift_gguf.model import Model

        threads = self.options.n_threads
        with Model(self._intermediate, calibrate.options(threads)) as model:
            texts = calibrate.answers(
                model,
                self.work / "texts.json",
                key=self._intermediate.name,
                n_tokens=self.options.calibration_tokens,
                report=report,
            )
        found = calibrate.collect(self._intermediate, texts, n_threads=threads, report=report)
        imatrix.write(self._matrix, found.usage, text="the model's own answers")

    def _quantize(self, quantization: Quantization, report: Report) -> None:
        matrix = self._matrix if self.options.auto_imatrix else self.options.imatrix
        job = {
            "source": str(self._intermediate),
            "quantization": dataclasses.asdict(quantization),
            "imatrix": str(matrix) if matrix else None,
            "n_threads": self.options.n_threads or 0,
        }
        with self._making(self._model) as part:
            done = steps.run(
                "quantize",
                {**job, "out": str(part)},
                what="quantizing",
                grows=part,
                expected=self.plan.model,
                environment={},
                report=report,
            )
        self.peak_bytes = max(self.peak_bytes, done.peak_bytes)

    def _try_out(self, made: Path, what: str, report: Report) -> None:
        """
        Raises:
            ConvertError: llama.cpp cannot load the converted file, or cannot decode a token.
        """
        job = {"out": str(made), "n_threads": self.options.n_threads}
        size = made.stat().st_size
        try:
            steps.run(
                "try_out", job, what=what, grows=made, expected=size, environment={}, report=report
            )
        except ConvertError as error:
            reason = str(error).removeprefix(f"{made}").lstrip(": ")
            raise ConvertError(
                f"llama.cpp cannot run the converted {self.checkpoint.name}: {reason}; if "
                "transformers 5 has saved the checkpoint, use the original one instead"
            ) from error

    @contextlib.contextmanager
    def _making(self, path: Path) -> Iterator[Path]:
        """Yields a temporary path; renames it to `path` when the block succeeds."""
        part = path.with_suffix(".part")
        try:
            yield part
            os.replace(part, path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = self.out.parent
            raise ConvertError(
                f"the disk is full: free some space for {where} and start again"
            ) from error
        finally:
            part.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Makes a rename in `folder` durable."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
