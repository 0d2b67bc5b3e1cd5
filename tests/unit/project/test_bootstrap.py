"""scripts/bootstrap.py without building anything: what it checks, says and remembers."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bootstrap

SCRIPT = Path(bootstrap.__file__)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree with what the build depends on."""
    root = tmp_path / "root"
    for name in ("pyproject.toml", "CMakeLists.txt", "native/src/a.cpp", "native/README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    monkeypatch.setattr(bootstrap, "ROOT", root)
    for name in ("CMAKE_ARGS", "SWIFT_LLAMA_CPP_DIR"):
        monkeypatch.delenv(name, raising=False)
    return root


@pytest.fixture
def venv(tmp_path: Path, root: Path) -> Path:
    """An environment that is up to date with `root`, as far as bootstrap can see."""
    venv = tmp_path / "venv"
    library = venv / "lib" / "python3.12" / "site-packages" / "swift_gguf" / "lib" / "libllama.so"
    for path in (venv / "bin" / "python", library):
        path.parent.mkdir(parents=True)
        path.touch()
    remember(venv, key=bootstrap.build_key(""))
    return venv


def remember(venv: Path, **changes: object) -> None:
    python = [sys.implementation.name, *sys.version_info[:2], os.uname().machine]
    state = {"python": python, "busy": False, "cmake_args": "", "extra": ""} | changes
    (venv / bootstrap.STATE).write_text(json.dumps(state))


def ready(venv: Path, extra: str = "") -> bool:
    state = bootstrap.read_state(venv)
    key = bootstrap.build_key(state.get("cmake_args", ""))
    return bootstrap.is_ready(venv, state, key, extra)


def test_an_old_python_can_parse_it() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


def test_an_old_python_is_told_what_to_do() -> None:
    code = f"import sys, runpy; sys.version_info = (3, 6, 15); runpy.run_path({str(SCRIPT)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("swift-gguf needs Python 3.10 or newer; this is 3.6: ")
    assert done.stderr.count("\n") == 1


def test_nothing_to_do(venv: Path) -> None:
    assert ready(venv)
    assert bootstrap.bootstrap(venv, extra="") == []
    assert not (venv / bootstrap.LOG).exists()


@pytest.mark.parametrize("name", ["pyproject.toml", "CMakeLists.txt", "native/src/a.cpp"])
def test_a_changed_file_is_built(venv: Path, root: Path, name: str) -> None:
    (root / name).write_text("changed")
    assert not ready(venv)


def test_what_the_build_does_not_read_changes_nothing(venv: Path, root: Path) -> None:
    (root / "native" / "README.md").write_text("changed")
    (root / "Makefile").write_text("new")
    assert ready(venv)


@pytest.mark.parametrize("installed", bootstrap.EXTRAS)
def test_tools_stay(venv: Path, installed: str) -> None:
    """`make check` after `make test` finds more than it needs; `make test` after it, too little."""
    remember(venv, key=bootstrap.build_key(""), extra=installed)
    enough = {extra: ready(venv, extra) for extra in bootstrap.EXTRAS}
    assert enough == {"": True, "dev": installed != "", "test": installed == "test"}


def test_cmake_args_are_remembered(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = "-DGGML_CUDA=ON"
    remember(venv, key=bootstrap.build_key(cuda), cmake_args=cuda)
    assert bootstrap.bootstrap(venv, extra="") == []
    monkeypatch.setenv("CMAKE_ARGS", cuda)
    assert bootstrap.bootstrap(venv, extra="") == []
    assert bootstrap.build_key("") != bootstrap.build_key(cuda)


def test_the_server_is_remembered(venv: Path) -> None:
    cuda = "-DGGML_CUDA=ON"
    both = f"{cuda} {bootstrap.SERVER_ARGS}"
    remember(venv, key=bootstrap.build_key(both), cmake_args=both)
    assert bootstrap.bootstrap(venv, extra="", server=True) == []
    assert bootstrap.bootstrap(venv, extra="") == []


@pytest.mark.parametrize("change", [{"busy": True}, {"python": ["cpython", 3, 9, "x86_64"]}])
def test_an_interrupted_or_foreign_environment_is_made_anew(
    venv: Path, change: dict[str, object]
) -> None:
    remember(venv, key=bootstrap.build_key(""), **change)
    assert bootstrap.read_state(venv) == {}


def test_a_damaged_environment_is_noticed(venv: Path) -> None:
    next(venv.rglob("libllama.so")).unlink()
    assert not ready(venv)
    (venv / "bin" / "python").unlink()
    assert bootstrap.read_state(venv) == {}
    (venv / bootstrap.STATE).write_text('{"key": ')
    assert bootstrap.read_state(venv) == {}


def test_the_users_own_checkout_is_always_built(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWIFT_LLAMA_CPP_DIR", "/somewhere")
    remember(venv, key=bootstrap.build_key(""))
    assert not ready(venv)


@pytest.mark.usefixtures("root")
def test_a_folder_of_the_users_is_not_taken(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("text")
    with pytest.raises(bootstrap.Failure, match="not a virtual environment"):
        bootstrap.bootstrap(folder, extra="")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_machine_without_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(bootstrap.Failure, match="apt install build-essential"):
        bootstrap.check_machine()
    (tmp_path / "g++").touch(0o755)
    with pytest.raises(bootstrap.Failure, match="apt install git"):
        bootstrap.check_machine()
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(bootstrap.Failure, match=r"apt install python3\.\d+-venv"):
        bootstrap.check_machine()


# What the tools really print, shortened.
COMPILER = """\
  Building editable for swift-gguf (pyproject.toml): finished with status 'error'
  error: subprocess-exited-with-error
      [107/140] Building CXX object llama.dir/swift-draft.cpp.o
      ../../native/src/swift-draft.cpp: In function 'int broken(int)':
      ../../native/src/swift-draft.cpp:107:15: error: expected primary-expression
      ninja: build stopped: subcommand failed.
  ERROR: Failed building editable for swift-gguf
ERROR: Could not build wheels for swift-gguf, which is required to install it
"""
WRAPPED = """\
      CMake Error at CMakeLists.txt:51 (message):
        swift-gguf: 0001-skip.patch does not fit the llama.cpp in
        /somewhere/llama.cpp; it is made for commit 0c1e57098: check that commit
        out


      -- Configuring incomplete, errors occurred!
ERROR: Failed building editable for swift-gguf
"""
CMAKE = """\
      CMake Error at ggml/src/ggml-cuda/CMakeLists.txt:200 (message):
        CUDA Toolkit not found


      -- Configuring incomplete, errors occurred!
"""
NETWORK = """\
WARNING: Retrying after connection broken by 'NewConnectionError(...)': /simple/numpy/
ERROR: Could not find a version that satisfies the requirement numpy
ERROR: No matching distribution found for numpy
"""
CONFLICT = """\
ERROR: Cannot install a==1 and b==2 because these package versions have conflicting dependencies.
note: This error originates from pip
"""


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        (COMPILER, "../../native/src/swift-draft.cpp:107:15: error: expected primary-expression"),
        (NETWORK + COMPILER, "../../native/src/swift-draft.cpp:107:15: error: expected primary-"),
        (WRAPPED, "0001-skip.patch does not fit the llama.cpp in /somewhere/llama.cpp; it is made"),
        (CMAKE, "CMake Error at ggml/src/ggml-cuda/CMakeLists.txt:200 (message): CUDA Toolkit not"),
        (NETWORK, "no connection to the package index; check the network"),
        (CONFLICT, "Cannot install a==1 and b==2 because"),
        (NETWORK + "OSError: [Errno 28] No space left on device", "the disk is full"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "the compiler ran out of"),
        ("something\n\n  else went wrong  \n\n", "else went wrong"),
        ("", "no reason given"),
        ("x" * 9999, "x" * 400),
    ],
)
def test_the_cause_of_a_failure(output: str, cause: str) -> None:
    found = bootstrap.cause(output)
    assert found.startswith(cause)
    assert "\n" not in found
    assert len(found) <= 400


def test_a_tool_and_its_children_end_with_us() -> None:
    command = ["sh", "-c", "sleep 60 & echo started; wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        bootstrap.stop(process)
        # its end comes when the last of them has let go
        assert process.stdout.read() == b""
