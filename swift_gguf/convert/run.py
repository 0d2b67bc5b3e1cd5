"""A conversion: its steps, what they leave behind, and how they are taken up again.

All that is unfinished lies in a folder beside the model to be, ``MODEL.gguf.convert``, which goes
when the model is whole.  What a step made is named by all that went into it, so that a run finds
what is still good of an earlier one, and only that.
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
    """What to make of a checkpoint.

    Raises:
        ConvertError: options that exclude each other.
    """

    quantization: Quantization | None = None
    """None: the intermediate is the model."""
    outtype: str = "bf16"
    """Of the intermediate: `plan.OUTTYPES`."""
    imatrix: Path | None = None
    auto_imatrix: bool = False
    """Computed on the model's own answers."""
    calibration_tokens: int = N_TOKENS
    """Of the model's own answers."""
    keep_intermediate: bool = False
    name: str | None = None
    """general.name; None: what the converter makes of the checkpoint."""
    prepares: bool = False
    """Room for a sidecar is wanted, too."""
    embeds: bool = False
    """`Conversion.finish` is to be given keys."""
    n_threads: int | None = None

    def __post_init__(self) -> None:
        if self.outtype not in OUTTYPES:
            raise ConvertError(f"no type {self.outtype!r:.20}; use one of {', '.join(OUTTYPES)}")
        if (self.imatrix or self.auto_imatrix) and self.quantization is None:
            raise ConvertError("an importance matrix is for --quantize; give that, too")
        needs = self.quantization.needs_imatrix if self.quantization else None
        if needs and not (self.imatrix or self.auto_imatrix):
            raise ConvertError(
                f"{needs} needs to know which weights matter; pass --imatrix auto, or a file"
            )


class Conversion:
    """Converts a checkpoint into the GGUF `out`.  Use as a context manager: the folder of what is
    unfinished belongs to one process at a time.

    Raises:
        ConvertError: the converter does not read it, the disk is too small, another process is at
            it.
        NativeLibraryError: there is no converter.
    """

    def __init__(self, checkpoint: Checkpoint, out: Path, options: ConvertOptions) -> None:
        self.checkpoint, self.out, self.options = checkpoint, out, options
        self.work = out.with_name(out.name + SUFFIX)
        self.peak_bytes = 0
        """Of the memory of the steps that ran in processes of their own."""
        self._converter = converter.find()
        converter.require_convertible(checkpoint, self._converter)

    def __enter__(self) -> Conversion:
        import filelock

        if not self.out.parent.is_dir():
            raise ConvertError(f"{self.out.parent}: no such folder; make it, or write elsewhere")
        if self.options.imatrix:
            imatrix.read(self.options.imatrix)  # what is wrong with it is better known now
        self.work.mkdir(exist_ok=True)
        self._lock = filelock.FileLock(self.work / "lock")
        with contextlib.suppress(filelock.Timeout, FileNotFoundError):
            self._lock.acquire(timeout=LOCK_SECONDS)
        if not self._lock.is_locked or not (self.work / "lock").exists():  # it was ending just now
            raise ConvertError(f"another process is converting to {self.out} already")
        try:
            self._tidy()  # before the check: what a killed run left takes room
            if not self.is_done:
                self.plan.require_space()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            if not any(path.suffix in (".gguf", ".json") for path in self.work.iterdir()):
                shutil.rmtree(self.work)  # while it is ours: another process may wait for it
        self._lock.release()

    @property
    def is_done(self) -> bool:
        """Did an earlier run of the same write the model, and was ended in what came after?"""
        try:
            return bool(json.loads(self._done.read_text()) == self._made())
        except (OSError, ValueError, ModelError):
            return False

    def _made(self) -> list[object]:
        """What is under the final name, and how it was asked for."""
        options = self.options
        wishes = [options.embeds, options.keep_intermediate]
        return [self._model.name, fingerprint(self.out), *wishes]

    @property
    def _done(self) -> Path:
        return self.work / "done.json"

    def forget(self) -> None:
        """All that was wanted is there: nothing is kept for another run."""
        self._done.unlink(missing_ok=True)

    # -- what there is, and will be ----------------------------------------------------------------

    @property
    def kept(self) -> Path | None:
        """Where the intermediate is kept, if it is."""
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
        """Removes what runs with other options, or killed ones, left."""
        wanted = {self._intermediate, self._matrix, self._model}
        for path in self.work.iterdir():
            if path.name != "lock" and path.suffix != ".json" and path not in wanted:
                path.unlink()

    # -- steps -------------------------------------------------------------------------------------

    def run(self, report: Report = lambda *_: None) -> Path:
        """All steps up to the model, which still lies among what is unfinished.

        Raises:
            ConvertError: a step failed, or llama.cpp does not run what it made.
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
        """Puts the model under its name, with `keys` added to its metadata."""
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
                environment={"HF_HUB_OFFLINE": "1"},  # all that it needs is in the folder
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
            ConvertError: llama.cpp does not load what a step made, or aborts at its first token.
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
                f"llama.cpp does not run what its converter made of {self.checkpoint.name}: "
                f"{reason}; was it saved anew by transformers 5? Take it as its makers saved it"
            ) from error

    @contextlib.contextmanager
    def _making(self, path: Path) -> Iterator[Path]:
        """A file to write, which has its name only when it is whole."""
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
    """Makes a rename last."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
