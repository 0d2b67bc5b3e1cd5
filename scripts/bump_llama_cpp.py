#!/usr/bin/env python3
"""Moves the pinned llama.cpp: bump_llama_cpp.py VERSION, a release of llama-cpp-python.

Downloads the release's source, writes native/llama_cpp.pin and pyproject.toml, tries the patches,
rebuilds, and runs tests/native and tests/model.  On failure the old pin comes back, unless --keep
is given.  Patches that do not fit leave the tree and the rejected hunks in build/bump.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

TESTS = ("tests/native", "tests/model")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "native"))

import source  # noqa: E402
from source import Pin, SourceError  # noqa: E402

WORK = ROOT / "build" / "bump"
PYPROJECT = ROOT / "pyproject.toml"


say = partial(print, flush=True)  # in order with what the build and the tests print


class BumpError(Exception):
    """One line that says what is wrong and what to do."""


# -- the pin ---------------------------------------------------------------------------------------


def with_pin(text: str, pin: Pin) -> str:
    """native/llama_cpp.pin's text with another pin; comments and layout stay."""
    fields = {
        "llama-cpp-python": pin.version,
        "sdist-sha256": pin.sha256,
        "llama.cpp-commit": pin.commit,
    }
    for key, value in fields.items():
        line = re.compile(rf"^({re.escape(key)} *= *)\S+", re.MULTILINE)
        text, count = line.subn(rf"\g<1>{value}", text)
        if count != 1:
            raise BumpError(f"native/llama_cpp.pin has {count} lines for {key}; there must be one")
    return text


def with_requirement(text: str, version: str) -> str:
    """pyproject.toml's text with another version of llama-cpp-python."""
    text, count = re.subn(r'("llama-cpp-python==)[^";\s]+', rf"\g<1>{version}", text)
    if count != 1:
        raise BumpError(f"pyproject.toml names llama-cpp-python== {count} times, not once")
    return text


def commit_of(archive: Path, version: str) -> str:
    """The llama.cpp commit inside a release's source: 40 hex digits, fewer, or "" if unnamed.

    Source distributions made with the repository's .git carry the submodule's HEAD; the changelog
    only ever has a short form.
    """
    prefix = f"llama_cpp_python-{version}/"
    short = ""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(prefix)
            if name not in (".git/modules/vendor/llama.cpp/HEAD", "CHANGELOG.md"):
                continue
            file = tar.extractfile(member)
            text = file.read().decode(errors="replace") if file else ""
            if name == "CHANGELOG.md":
                short = commit_in_changelog(text, version)
            elif re.fullmatch(r"[0-9a-f]{40}\s*", text):
                return text.strip()
    return short


def commit_in_changelog(text: str, version: str) -> str:
    """The newest `llama.cpp@COMMIT` of a version's section, "" if there is none."""
    section = re.search(rf"^## \[{re.escape(version)}\](.*?)(?=^## |\Z)", text, re.M | re.S)
    commit = re.search(r"llama\.cpp@([0-9a-f]{7,40})\b", section[1]) if section else None
    return commit[1] if commit else ""


def choose_commit(found: str, given: str | None, version: str) -> str:
    """The full commit to pin, from what the source names and what the user gave."""
    if given and not given.startswith(found):
        raise BumpError(f"the source of {version} has llama.cpp's commit {found}, not {given}")
    commit = given or found
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        seen = f"only its beginning, {commit}," if commit else "nothing of it"
        raise BumpError(
            f"the source of {version} does not name its llama.cpp commit in full ({seen} was "
            "found); look it up and give it as --commit"
        )
    return commit


# -- the patches -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """A file of a patch that does not apply; `hunks` counts from 1, empty if the file is gone."""

    path: str
    hunks: tuple[int, ...]

    def __str__(self) -> str:
        if not self.hunks:
            return f"{self.path}: the file is gone"
        return f"{self.path}: hunk {', '.join(map(str, self.hunks))}"


def try_patch(tree: Path, patch: Path) -> list[Misfit]:
    """Apply what fits of a patch; returns what does not, and leaves it beside the files as .rej."""
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent), "LC_ALL": "C"}
    command = ["git", "apply", "--reject", "--verbose", str(patch)]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode == 0:
        return []
    found = list(misfits(done.stderr))
    if not found:
        raise BumpError(f"{patch.name} cannot be read: {done.stderr.strip().splitlines()[-1]}")
    return found


def misfits(output: str) -> Iterator[Misfit]:
    """Reads what `git apply --reject --verbose` says."""
    for gone in re.findall(r"^error: (.+): No such file or directory$", output, re.MULTILINE):
        yield Misfit(path=gone, hunks=())
    parts = re.split(r"^Applying patch (.+) with \d+ rejects?\.\.\.$", output, flags=re.MULTILINE)
    for path, report in zip(parts[1::2], parts[2::2], strict=True):
        rejected = re.findall(r"^Rejected hunk #(\d+)\.$", report, re.MULTILINE)
        yield Misfit(path=path, hunks=tuple(map(int, rejected)))


def make_tree(archive: Path, tree: Path, version: str) -> None:
    """The release's llama.cpp as a git repository, so that a repaired patch is a `git diff`."""
    source.unpack(archive, tree, version)
    if not (tree / "include" / "llama.h").exists():
        raise BumpError(f"the source of {version} has no llama.cpp inside")
    git(tree, "init", "--quiet")
    commit_all(tree, f"llama.cpp of llama-cpp-python {version}")


def commit_all(tree: Path, message: str) -> None:
    git(tree, "add", "--all", "--force")
    author = ["-c", "user.name=bump", "-c", "user.email=bump@localhost"]
    git(tree, *author, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "-m", message)


def git(tree: Path, *arguments: str) -> None:
    done = subprocess.run(["git", *arguments], cwd=tree, capture_output=True, text=True)
    if done.returncode != 0:
        raise BumpError(f"git {arguments[0]} failed in {tree}: {done.stderr.strip()}")


def try_patches(tree: Path) -> None:
    """Apply and commit each patch; raises BumpError at the first that does not fit."""
    for patch in source.PATCHES:
        wrong = try_patch(tree, patch)
        if wrong:
            rejected = keep_rejects(tree, WORK / "rejected" / patch.stem)
            say(f"{patch.name} does not fit:")
            for misfit in wrong:
                say(f"  {misfit}")
            say(f"rejected hunks: {shown(rejected)}\nthe rest is applied in: {shown(tree)}")
            raise BumpError(
                f"mend {shown(tree)}, then `git -C {shown(tree)} diff` is the new {patch.name}, "
                "below its old header"
            )
        commit_all(tree, patch.name)
        say(f"{patch.name} fits")


def keep_rejects(tree: Path, folder: Path) -> Path:
    """Move the .rej files out of the tree, so that its `git diff` holds the patch alone."""
    for reject in tree.rglob("*.rej"):
        target = folder / reject.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(reject, target)
    return folder


# -- the command -----------------------------------------------------------------------------------


def shown(path: Path) -> str:
    return os.path.relpath(path)


def fetch(version: str) -> tuple[Path, str]:
    """The release's archive, kept in the cache for the build, and its sha256."""
    archive = source.cache_dir() / "source" / f"llama_cpp_python-{version}.tar.gz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        os.replace(source.download_sdist(version, Path(folder)), archive)
    return archive, source.sha256_of(archive)


def rebuild_and_test() -> None:
    for what, command in (
        ("the build", [sys.executable, str(ROOT / "scripts" / "bootstrap.py"), "--test"]),
        ("tests", [str(ROOT / ".venv" / "bin" / "pytest"), "-q", *TESTS]),
    ):
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise BumpError(f"{what} failed")


def mentions(version: str) -> list[str]:
    """Other files of the repository that name a version."""
    command = ["git", "grep", "--files-with-matches", "--fixed-strings", version]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.split()


def bump(version: str, *, commit: str | None, keep: bool, test: bool) -> None:
    before = {path: path.read_text() for path in (source.PIN_FILE, PYPROJECT)}
    old = source.read_pin()
    archive, sha256 = fetch(version)
    commit = choose_commit(commit_of(archive, version), commit, version)
    new = Pin(version=version, sha256=sha256, commit=commit)
    say(f"llama-cpp-python {old.version} -> {new.version}, sha256 {new.sha256}")
    say(f"llama.cpp {old.commit[:9]} -> {new.commit[:9]}")
    after = {
        source.PIN_FILE: with_pin(before[source.PIN_FILE], new),
        PYPROJECT: with_requirement(before[PYPROJECT], new.version),
    }
    write(after)
    try:
        shutil.rmtree(WORK, ignore_errors=True)
        make_tree(archive, WORK / "llama.cpp", version)
        try_patches(WORK / "llama.cpp")
        if test:
            rebuild_and_test()
    except BaseException:
        if not keep:
            write(before)
            say(f"the pin is {old.version} again")
        raise
    if old.version != new.version and (left := mentions(old.version)):
        say(f"still naming {old.version}: {' '.join(left)}")
    say("pinned; say so in CHANGELOG.md")


def write(files: dict[Path, str]) -> None:
    for path, text in files.items():
        path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("version", metavar="VERSION", help="a release of llama-cpp-python")
    parser.add_argument("--commit", metavar="SHA", help="its llama.cpp commit, if it names none")
    parser.add_argument("--keep", action="store_true", help="keep the new pin even on failure")
    parser.add_argument("--no-test", action="store_true", help="neither rebuild nor test")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the old pin comes back
    try:
        bump(options.version, commit=options.commit, keep=options.keep, test=not options.no_test)
    except (BumpError, SourceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
