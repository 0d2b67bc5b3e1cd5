"""native/source.py and the pure parts of the bump script, on a llama.cpp of two files."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import bump_llama_cpp as bump
import source

VERSION = "9.8.7"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HEAD_MEMBER = ".git/modules/vendor/llama.cpp/HEAD"
CHANGELOG = """# Changelog

## [Unreleased]

- feat: update llama.cpp to ggml-org/llama.cpp@aaaaaaaaa

## [9.8.7]

- fix: something
- feat: update llama.cpp to ggml-org/llama.cpp@012345678
- feat: update llama.cpp to ggml-org/llama.cpp@bbbbbbbbb

## [9.8.6]

- feat: update llama.cpp to ggml-org/llama.cpp@ccccccccc
"""

LLAMA_H = "".join(f"int line_{n};\n" for n in range(30))
TREE = {"include/llama.h": LLAMA_H, "src/llama.cpp": "int main_of_llama;\n"}


def change(tree: Mapping[str, str]) -> dict[str, str]:
    """What the test patch does: two hunks in one file, one in the other."""
    header = tree["include/llama.h"].replace("line_3;", "line_3, ours;")
    return {
        **tree,
        "include/llama.h": header.replace("line_25;", "line_25, ours_too;"),
        "src/llama.cpp": tree["src/llama.cpp"] + "int swift;\n",
    }


def write_tree(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_sdist(path: Path, files: Mapping[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-{VERSION}/{name}")
            member.size, member.mtime = len(text.encode()), 1_700_000_000
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A patch of TREE in place of the real ones."""
    write_tree(tmp_path / "diff" / "a", TREE)
    write_tree(tmp_path / "diff" / "b", change(TREE))
    command = ["git", "diff", "--no-index", "--no-prefix", "a", "b"]
    diff = subprocess.run(command, cwd=tmp_path / "diff", capture_output=True, text=True)
    path = tmp_path / "0001-test.patch"
    path.write_text(f"Why: a test\n\n{diff.stdout}")
    monkeypatch.setattr(source, "PATCHES", [path])
    return path


@pytest.fixture
def sdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source distribution, which is what "pip" downloads into an empty cache."""
    files = {f"vendor/llama.cpp/{name}": text for name, text in TREE.items()}
    files |= {"vendor/llama.cpp/models/big.gguf": "x", "README.md": "x"}
    path = write_sdist(tmp_path / f"llama_cpp_python-{VERSION}.tar.gz", files)

    def download(version: str, folder: Path) -> Path:
        assert version == VERSION
        return Path(shutil.copy(path, folder))

    monkeypatch.setattr(source, "download_sdist", download)
    monkeypatch.setenv("SWIFT_GGUF_CACHE", str(tmp_path / "cache"))
    return path


@pytest.fixture
def pin(sdist: Path) -> source.Pin:
    return source.Pin(version=VERSION, sha256=source.sha256_of(sdist), commit=COMMIT)


# -- the pin -------------------------------------------------------------------------------------


def test_pin_round_trip_keeps_comments(tmp_path: Path) -> None:
    before = source.PIN_FILE.read_text()
    wanted = source.Pin(version="1.2.3", sha256="f" * 64, commit=COMMIT)
    file = tmp_path / "pin"
    file.write_text(bump.with_pin(before, wanted))
    assert source.read_pin(file) == wanted
    assert bump.with_pin(file.read_text(), source.read_pin()) == before


def test_a_pin_file_without_a_field_is_refused() -> None:
    with pytest.raises(bump.BumpError, match="0 lines for sdist-sha256"):
        bump.with_pin(
            "llama-cpp-python = 1\nllama.cpp-commit = 2\n",
            source.Pin(version="1", sha256="2", commit="3"),
        )


def test_requirement_and_pin_name_one_release() -> None:
    text = bump.PYPROJECT.read_text()
    assert bump.with_requirement(text, source.read_pin().version) == text
    assert '"llama-cpp-python==1.2.3"' in bump.with_requirement(text, "1.2.3")


@pytest.mark.parametrize("text", ["", '"llama-cpp-python==1", "llama-cpp-python==2"'])
def test_a_requirement_that_is_not_there_once_is_refused(text: str) -> None:
    with pytest.raises(bump.BumpError, match="times, not once"):
        bump.with_requirement(text, "1.2.3")


# -- the commit of a release ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "commit"),
    [
        ({"CHANGELOG.md": CHANGELOG, HEAD_MEMBER: COMMIT + "\n"}, COMMIT),
        ({"CHANGELOG.md": CHANGELOG}, "012345678"),
        ({"CHANGELOG.md": CHANGELOG, HEAD_MEMBER: "ref: refs/heads/master\n"}, "012345678"),
        ({"CHANGELOG.md": CHANGELOG.replace("9.8.7", "9.8.8")}, ""),
        ({"README.md": ""}, ""),
    ],
)
def test_commit_of_a_source(tmp_path: Path, files: dict[str, str], commit: str) -> None:
    assert bump.commit_of(write_sdist(tmp_path / "x.tar.gz", files), VERSION) == commit


def test_commit_of_an_old_section_does_not_leak() -> None:
    assert bump.commit_in_changelog(CHANGELOG, "9.8.6") == "ccccccccc"
    assert (
        bump.commit_in_changelog("## [9.8.7]\n\n## [9.8.6]\n- llama.cpp@ccccccccc", VERSION) == ""
    )


def test_a_full_commit_is_pinned() -> None:
    assert bump.choose_commit(COMMIT, None, VERSION) == COMMIT
    assert bump.choose_commit(COMMIT[:9], COMMIT, VERSION) == COMMIT
    assert bump.choose_commit("", COMMIT, VERSION) == COMMIT


@pytest.mark.parametrize(
    ("found", "given", "message"),
    [
        (COMMIT[:9], None, "--commit"),
        ("", None, "nothing of it"),
        ("", "master", "--commit"),
        (COMMIT[:9], "f" * 40, f"commit {COMMIT[:9]}, not {'f' * 40}"),
    ],
)
def test_half_a_commit_is_refused(found: str, given: str | None, message: str) -> None:
    with pytest.raises(bump.BumpError, match=message):
        bump.choose_commit(found, given, VERSION)


# -- fetching ------------------------------------------------------------------------------------


def test_the_archive_is_downloaded_once(pin: source.Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = source.fetch_sdist(pin)
    monkeypatch.setattr(source, "download_sdist", None)
    assert source.fetch_sdist(pin) == archive


def test_a_damaged_archive_is_fetched_again(pin: source.Pin) -> None:
    archive = source.fetch_sdist(pin)
    archive.write_bytes(archive.read_bytes()[:-1])
    assert source.sha256_of(source.fetch_sdist(pin)) == pin.sha256


def test_another_archive_than_pinned_is_refused_and_not_kept(pin: source.Pin) -> None:
    wrong = source.Pin(version=VERSION, sha256="0" * 64, commit=COMMIT)
    with pytest.raises(source.SourceError, match=f"{pin.sha256}.*llama_cpp.pin.*{'0' * 64}"):
        source.fetch_sdist(wrong)
    assert contents(source.cache_dir()) == {}


# -- patching ------------------------------------------------------------------------------------


def test_provide_unpacks_what_is_needed_and_patches(
    tmp_path: Path, pin: source.Pin, patch: Path
) -> None:
    dest = tmp_path / "llama.cpp"
    source.provide(dest, pin=pin, patched=True)
    found = contents(dest)
    del found[source.STAMP]
    assert found == change(TREE)

    (dest / "src" / "llama.cpp").write_text("kept: the second call does nothing\n")
    source.provide(dest, pin=pin, patched=True)
    assert "kept" in (dest / "src" / "llama.cpp").read_text()

    patch.write_text(patch.read_text() + "\n")  # another patch: from the start
    source.provide(dest, pin=pin, patched=True)
    assert (dest / "src" / "llama.cpp").read_text() == change(TREE)["src/llama.cpp"]


def test_provide_without_the_patch(tmp_path: Path, pin: source.Pin, patch: Path) -> None:
    source.provide(tmp_path / "plain", pin=pin, patched=False)
    assert contents(tmp_path / "plain").items() >= TREE.items()


@pytest.mark.usefixtures("patch")
def test_patching_twice_is_patching_once(tmp_path: Path, pin: source.Pin) -> None:
    tree = write_tree(tmp_path / "tree", TREE | {"src/other.cpp": "left alone\n"})
    for _ in range(2):
        source.apply_patches(tree, pin=pin)
        assert contents(tree) == change(TREE) | {"src/other.cpp": "left alone\n"}


@pytest.mark.usefixtures("patch")
def test_a_tree_inside_another_repository_is_patched(tmp_path: Path, pin: source.Pin) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    tree = write_tree(tmp_path / "build" / "tree", TREE)
    source.apply_patches(tree, pin=pin)
    assert contents(tree) == change(TREE)


@pytest.mark.usefixtures("patch")
def test_a_tree_that_does_not_fit_is_left_alone(tmp_path: Path, pin: source.Pin) -> None:
    other = TREE | {"src/llama.cpp": "int rewritten;\n"}
    tree = write_tree(tmp_path / "tree", other)
    with pytest.raises(source.SourceError) as error:
        source.apply_patches(tree, pin=pin)
    assert contents(tree) == other
    message = str(error.value)
    assert "\n" not in message
    assert "0001-test.patch" in message
    assert f"commit {COMMIT[:9]} (llama-cpp-python {VERSION})" in message


def test_without_git(tmp_path: Path, pin: source.Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(source.SourceError, match="apt install git"):
        source.apply_patches(tmp_path, pin=pin)


# -- the command line ----------------------------------------------------------------------------


def run_source(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["source.py", *map(str, arguments)])
    return source.main()


@pytest.mark.usefixtures("patch")
def test_the_users_own_tree_is_patched_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = write_tree(tmp_path / "tree", TREE)
    assert run_source(monkeypatch, "--tree", tree, "--no-patch") == 0
    assert contents(tree) == TREE
    for _ in range(2):
        assert run_source(monkeypatch, "--tree", tree) == 0
        assert contents(tree) == change(TREE)


def test_a_folder_that_is_no_checkout_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_source(monkeypatch, "--tree", tmp_path) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "not a llama.cpp checkout; unset SWIFT_LLAMA_CPP_DIR" in err
    assert err.count("\n") == 1


# -- the patches at a bump -----------------------------------------------------------------------


def test_a_patch_that_fits_is_applied(tmp_path: Path, patch: Path) -> None:
    tree = write_tree(tmp_path / "tree", TREE)
    assert bump.try_patch(tree, patch) == []
    assert contents(tree) == change(TREE)


def test_hunks_that_do_not_fit_are_named_and_the_rest_applied(tmp_path: Path, patch: Path) -> None:
    header = LLAMA_H.replace("line_25;", "line_25[2];")
    tree = write_tree(tmp_path / "tree", TREE | {"include/llama.h": header})
    found = bump.try_patch(tree, patch)
    assert found == [bump.Misfit(path="include/llama.h", hunks=(2,))]
    assert str(found[0]) == "include/llama.h: hunk 2"
    assert "line_3, ours;" in (tree / "include/llama.h").read_text()
    assert (tree / "src/llama.cpp").read_text() == change(TREE)["src/llama.cpp"]

    rejected = bump.keep_rejects(tree, tmp_path / "rejected")
    assert "line_25, ours_too;" in (rejected / "include/llama.h.rej").read_text()
    assert not list(tree.rglob("*.rej"))


def test_a_file_that_is_gone_is_named(tmp_path: Path, patch: Path) -> None:
    tree = write_tree(tmp_path / "tree", {"include/llama.h": LLAMA_H})
    assert [str(misfit) for misfit in bump.try_patch(tree, patch)] == [
        "src/llama.cpp: the file is gone"
    ]


def test_a_damaged_patch_is_not_taken_for_one_that_fits(tmp_path: Path, patch: Path) -> None:
    patch.write_text(patch.read_text().replace("@@ ", "@@ -x "))
    tree = write_tree(tmp_path / "tree", TREE)
    with pytest.raises(bump.BumpError, match=r"0001-test\.patch cannot be read: error: "):
        bump.try_patch(tree, patch)
