"""Models on the Hugging Face hub: ``hf:owner/repo[/file.gguf]``, through huggingface_hub."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from swift_gguf.errors import DownloadError, ModelError
from swift_gguf.hub.downloads import Meter, Progress, disk_reason, failed, watch

PREFIX = "hf:"
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def fetch(ref: str, *, progress: Progress | None) -> Path:
    """The path of ``hf:owner/repo[/file.gguf]``, from the cache or after a download.

    Raises ModelError if the reference is invalid or ambiguous, DownloadError if the download fails.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+\.gguf))?", ref.removeprefix(PREFIX))
    if match is None:
        raise ModelError(f"{ref} is not of the form hf:owner/repo or hf:owner/repo/file.gguf")
    repo, file = match.groups()
    hub = _Repository(ref, repo)
    names = _pieces(file or _choose(ref, hub.sizes))
    if missing := [name for name in names if name not in hub.sizes]:
        if hub.offline:
            raise hub.offline
        has = ", ".join(sorted(name for name in hub.sizes if name.endswith(".gguf"))) or "no GGUF"
        raise ModelError(f"{ref}: the repository has no {missing[0]}; it has {has}")
    return hub.fetch(names, progress)[0]


def fetch_folder(ref: str, patterns: Sequence[str], *, progress: Progress | None) -> Path:
    """Downloads the files of ``hf:owner/repo`` that match a pattern; returns their folder.

    patterns: file names, or paths with as many folders as the file has.

    Raises ModelError if the reference is invalid, DownloadError if the download fails.
    """
    hub = _folder(ref)
    names = _fitting(hub, patterns)
    if not any("/" not in name for name in names):
        raise ModelError(f"{ref} has no checkpoint")
    paths = zip(names, hub.fetch(names, progress), strict=True)
    return next(path.parent for name, path in paths if "/" not in name)


def list_folder(ref: str) -> dict[str, int]:
    """The files in the top folder of ``hf:owner/repo``, with sizes in bytes.  Downloads nothing.

    Raises like `fetch_folder`.
    """
    return {name: size for name, size in _folder(ref).sizes.items() if "/" not in name}


def _folder(ref: str) -> _Repository:
    match = re.fullmatch(r"[\w.-]+/[\w.-]+", ref.removeprefix(PREFIX))
    if match is None:
        raise ModelError(f"{ref} is not of the form hf:owner/repo")
    return _Repository(ref, match[0])


def _fitting(hub: _Repository, patterns: Sequence[str]) -> list[str]:
    """Files that match a pattern with the same number of folders."""
    return [
        name
        for name in sorted(hub.sizes)
        if any(name.count("/") == p.count("/") and fnmatch(name, p) for p in patterns)
    ]


class _Repository:
    """A repository on the hub; without a connection, its files in the cache."""

    def __init__(self, ref: str, repo: str) -> None:
        import huggingface_hub
        from huggingface_hub import constants, errors

        # The hub's own constant is fixed at its first import.
        self._endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        self._storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
        self._ref, self._repo = ref, repo
        self.offline: DownloadError | None = None
        """Why the hub cannot be reached: only files in the cache can be used then."""
        self._commit: str | None = None
        """The commit to take all files from; None: the one in the cache."""
        try:
            api = huggingface_hub.HfApi(endpoint=self._endpoint)
            info = api.model_info(repo, files_metadata=True)
            self.sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            self._commit = info.sha
        except Exception as error:  # the HTTP library, hence its errors, differs by version
            self.offline = _hub_failure(ref, error, self._storage)
            self.sizes = _hub_cached(self._storage)
            is_refused = (errors.RepositoryNotFoundError, errors.HFValidationError)
            if isinstance(error, is_refused) or not self.sizes:
                raise self.offline from error

    def fetch(self, names: Sequence[str], progress: Progress | None) -> list[Path]:
        """Downloads these files if necessary; returns their paths."""
        import huggingface_hub

        if not self.offline:
            self._require_space(names)
        meter = Meter(progress, sum(self.sizes[name] for name in names))
        paths, done = [], 0
        for name in names:
            try:
                with _quiet_hub(), watch(self._storage / "blobs", "*.incomplete", done, meter):
                    path = huggingface_hub.hf_hub_download(
                        self._repo,
                        name,
                        revision=self._commit,
                        endpoint=self._endpoint,
                        local_files_only=self.offline is not None,
                    )
            except Exception as error:
                raise _hub_failure(self._ref, error, self._storage) from error
            paths.append(Path(path))
            done += self.sizes[name]
            meter(done)
        if self._commit:  # huggingface_hub records a commit only if a branch was requested
            branch = self._storage / "refs" / "main"
            branch.parent.mkdir(parents=True, exist_ok=True)
            branch.write_text(self._commit)
        return paths

    def _require_space(self, names: Sequence[str]) -> None:
        """Checks the free disk space for the files that the cache does not have.

        Raises:
            DownloadError: there is not enough.
        """
        have = {
            (path.name, path.stat().st_size)
            for path in self._storage.glob("snapshots/**/*")
            if path.is_file()
        }
        sizes = {name: self.sizes[name] for name in names}
        missing = sum(size for name, size in sizes.items() if (Path(name).name, size) not in have)
        begun = sum(path.stat().st_size for path in self._storage.glob("blobs/*.incomplete"))
        where = next(path for path in self._storage.parents if path.exists())
        free = shutil.disk_usage(where).free
        if missing - begun > free:
            reason = (
                f"it needs {missing / 1e9:.2f} GB in {where}, but {free / 1e9:.2f} GB are free; "
                "free some space, or set HF_HOME to another folder"
            )
            raise failed(self._ref, reason)


def _hub_failure(ref: str, error: Exception, storage: Path) -> DownloadError:
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if isinstance(
        error, (RepositoryNotFoundError, HFValidationError)
    ):  # the first: also a gated repository
        reason = "no such repository, or no access; check the name, or log in with `hf auth login`"
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
    """The GGUF to download: the only one, or else the only Q4_K_M."""
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
    """Turns huggingface_hub's own progress bars off, which is a setting of the whole process."""
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
