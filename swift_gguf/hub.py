"""Models on the Hugging Face hub: ``hf:owner/repo[/file.gguf]``, through huggingface_hub."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from swift_gguf.downloads import Meter, Progress, disk_reason, failed, not_downloaded, watch
from swift_gguf.errors import DownloadError, ModelError

PREFIX = "hf:"
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def fetch(ref: str, *, download: bool, progress: Progress | None) -> Path:
    """The file that ``hf:owner/repo[/file.gguf]`` names, from the hub or from its cache.

    Raises ModelError if the reference is not clear, DownloadError if the file cannot be had.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+\.gguf))?", ref.removeprefix(PREFIX))
    if match is None:
        raise ModelError(f"{ref} is not of the form hf:owner/repo or hf:owner/repo/file.gguf")
    repo, file = match.groups()
    import huggingface_hub
    from huggingface_hub import constants, errors

    # The hub's own constant is fixed at its first import.
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    local: ModelError = not_downloaded(ref)  # to raise where only this machine can be asked
    if download:
        try:
            info = huggingface_hub.HfApi(endpoint=endpoint).model_info(repo, files_metadata=True)
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
    meter = Meter(progress, sum(sizes[name] for name in names))
    paths, done = [], 0
    for name in names:
        try:
            with _quiet_hub(), watch(storage / "blobs", "*.incomplete", done, meter):
                path = huggingface_hub.hf_hub_download(
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
        return failed(ref, reason)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
        return failed(ref, disk_reason(error, storage, "HF_HOME"))
    why = f"{type(error).__name__}: {error}".splitlines()[0]
    return failed(ref, f"no connection to the model hub ({why}); check the network and try again")


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
