"""Fetches the pinned llama.cpp source and applies our patches; run by CMake and by `make`.

    python native/source.py --dest DIR               the pinned source, patched, in DIR
    python native/source.py --tree DIR               patch the user's own llama.cpp checkout
    python native/source.py --fetch-only             only download; prints the archive's path

Needs only the standard library and pip.  Running it again does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

NATIVE = Path(__file__).resolve().parent
PIN_FILE = NATIVE / "llama_cpp.pin"
PATCHES = sorted((NATIVE / "patches").glob("*.patch"))

# What the libraries are built from; models, docs and tests are most of the archive.
NEEDED = ("CMakeLists.txt", "LICENSE", "cmake/", "common/", "ggml/", "include/", "src/", "vendor/")
# llama-server, an option of our build; and of its page and its helpers what is only for developers.
SERVER = ("tools/", "scripts/ui-assets.cmake")
SPARED = ("tools/ui/src/", "tools/ui/static/", "tools/ui/tests/", "tools/mtmd/test")
# llama.cpp's converter of Hugging Face checkpoints: Python, installed unchanged.
CONVERTER = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "gguf-py/LICENSE")
STAMP = ".swift-gguf-source"


class SourceError(Exception):
    """One line that says what is wrong and what to do."""


@dataclass(frozen=True, kw_only=True)
class Pin:
    """The llama.cpp release that native/llama_cpp.pin names."""

    version: str
    sha256: str
    commit: str


def read_pin(path: Path = PIN_FILE) -> Pin:
    lines = (line.partition("#")[0] for line in path.read_text().splitlines())
    fields = {
        key.strip(): value.strip()
        for key, eq, value in (line.partition("=") for line in lines)
        if eq
    }
    return Pin(
        version=fields["llama-cpp-python"],
        sha256=fields["sdist-sha256"],
        commit=fields["llama.cpp-commit"],
    )


def cache_dir() -> Path:
    """The same as `swift_gguf.hub.models.cache_dir`, without platformdirs."""
    if override := os.environ.get("SWIFT_GGUF_CACHE"):
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "swift-gguf"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swift-gguf"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_sdist(pin: Pin) -> Path:
    """The source distribution of llama-cpp-python, downloaded once and checked."""
    archive = cache_dir() / "source" / f"llama_cpp_python-{pin.version}.tar.gz"
    if archive.exists() and sha256_of(archive) == pin.sha256:
        return archive

    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        fetched = download_sdist(pin.version, Path(folder))
        actual = sha256_of(fetched)
        if actual != pin.sha256:
            raise SourceError(
                f"the source of llama-cpp-python=={pin.version} has sha256 {actual}, but "
                f"{PIN_FILE.name} expects {pin.sha256}; do not build it, and check where pip "
                "downloads from"
            )
        os.replace(fetched, archive)
    return archive


def download_sdist(version: str, folder: Path) -> Path:
    """Downloads a release's source distribution by pip."""
    requirement = f"llama-cpp-python=={version}"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    download = ["download", "--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
    command = [*pip, *download, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "pip failed").splitlines()[-1]
        raise SourceError(
            f"could not download the source of {requirement} ({reason.removeprefix('ERROR: ')}); "
            "check the network connection and try again"
        )
    return next(folder.glob("*.tar.gz"))


def unpack(archive: Path, dest: Path, version: str) -> None:
    """Extracts llama.cpp from the archive to `dest`, replacing what is there."""
    prefix = f"llama_cpp_python-{version}/vendor/llama.cpp/"
    shutil.rmtree(dest, ignore_errors=True)
    dest.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(prefix)
            is_llama_cpp = name != member.name and member.isfile()
            if not is_llama_cpp or not name.startswith(NEEDED + SERVER + CONVERTER):
                continue
            if name.startswith(SPARED):
                continue
            source = tar.extractfile(member)
            assert source is not None  # a regular file
            target = dest / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, target.open("wb") as out:
                shutil.copyfileobj(source, out)
            # unchanged files keep their time, so that a new patch does not rebuild everything
            os.utime(target, (member.mtime, member.mtime))


def run_patch(tree: Path, patch: Path, *options: str) -> bool:
    # Without the ceiling git takes an enclosing repository (ours) for the root and skips the files.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}
    command = ["git", "apply", *options, str(patch)]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True).returncode == 0


def apply_patches(tree: Path, *, pin: Pin) -> None:
    """Applies every patch that is not applied yet; does not touch the tree if one does not fit."""
    if shutil.which("git") is None:
        raise SourceError("git is needed to patch llama.cpp; install it (Debian: apt install git)")
    for patch in PATCHES:
        if run_patch(tree, patch, "--reverse", "--check"):
            continue
        if not (run_patch(tree, patch, "--check") and run_patch(tree, patch)):
            raise SourceError(
                f"{patch.name} does not fit the llama.cpp in {tree}; it is made for commit "
                f"{pin.commit[:9]} (llama-cpp-python {pin.version}): check that commit out"
            )


def provide(dest: Path, *, pin: Pin, patched: bool) -> None:
    """The pinned source in `dest`, patched or as it came.  Does nothing if it is there already."""
    state = pin.sha256 + "".join(sha256_of(patch) for patch in PATCHES if patched)
    state += "".join(NEEDED + SERVER + SPARED + CONVERTER)
    stamp = dest / STAMP
    if stamp.exists() and stamp.read_text() == state:
        return
    unpack(fetch_sdist(pin), dest, pin.version)
    if patched:
        apply_patches(dest, pin=pin)
    stamp.write_text(state)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--dest", type=Path, help="put the pinned source here")
    where.add_argument("--tree", type=Path, help="patch this checkout of llama.cpp in place")
    where.add_argument(
        "--fetch-only", action="store_true", help="only download the archive, print its path"
    )
    parser.add_argument("--no-patch", action="store_true", help="leave the source as it came")
    options = parser.parse_args()
    pin = read_pin()
    try:
        if options.fetch_only:
            print(fetch_sdist(pin))
        elif options.dest:
            provide(options.dest, pin=pin, patched=not options.no_patch)
        elif not (options.tree / "include" / "llama.h").exists():
            raise SourceError(
                f"{options.tree} is not a llama.cpp checkout; "
                "unset SWIFT_LLAMA_CPP_DIR or correct it"
            )
        elif not options.no_patch:
            apply_patches(options.tree, pin=pin)
    except SourceError as error:
        print(f"swift-gguf: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"swift-gguf: {error}; check free disk space and permissions", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
