"""Tab in real shells, and what `--help` shows and costs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import click
import pexpect
import pytest

from swift_gguf.cli import COMMANDS, root

CLI = Callable[..., subprocess.CompletedProcess[str]]

BASH = """
source /dev/stdin
COMP_WORDS=({words})
COMP_CWORD={index}
_swift_gguf_completion swift-gguf
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some files and folders; the only thing in ``deep`` is a folder with a model in it."""
    (tmp_path / "deep" / "down").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name in ("smart.gguf", "deep/down/model.gguf", "notes.txt", ".hidden.gguf"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """`swift-gguf` as it is found by a shell."""
    home = tmp_path / "home"
    home.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "HOME": str(home), "XDG_CONFIG_HOME": str(home)}


@pytest.fixture
def tab(cli: CLI, folder: Path, environment: dict[str, str]) -> Callable[[str], list[str]]:
    """`tab("generate smol")`: what Bash offers for the last word."""

    def press(line: str) -> list[str]:
        words = ["swift-gguf", *line.split(" ")]
        script = cli("completion", "bash").stdout
        done = subprocess.run(
            ["bash", "-c", BASH.format(words=" ".join(map(repr, words)), index=len(words) - 1)],
            input=script,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=folder,
            env=environment,
        )
        assert done.stderr == ""
        return done.stdout.split()

    return press


def test_bash_completes_commands_and_flags(tab: Callable[[str], list[str]]) -> None:
    assert tab("ge") == ["generate"]
    assert set(tab("")) >= set(COMMANDS)
    assert tab("serve smollm2-135m --api-key-") == ["--api-key-file"]
    assert tab("chat --thinking f") == ["fold"]
    assert tab("completion z") == ["zsh"]


@pytest.mark.parametrize(
    "command", ["bench", "chat", "generate", "info", "prepare", "serve", "tune"]
)
def test_bash_completes_models(tab: Callable[[str], list[str]], command: str) -> None:
    assert tab(f"{command} sm") == ["smollm2-135m", "smart.gguf"]


def test_bash_completes_paths(tab: Callable[[str], list[str]], folder: Path) -> None:
    assert tab("generate deep/down/") == ["deep/down/model.gguf"]
    assert tab(f"generate {folder}/sm") == [f"{folder}/smart.gguf"]
    assert tab("generate d") == ["deep/", "docs/"]
    assert tab("generate .h") == [".hidden.gguf"]
    # nothing but a folder: what is in it, too, or the shell would take the word to be finished
    assert tab("generate dee") == ["deep/", "deep/down/", "deep/down/model.gguf"]
    assert tab("generate nowhere/") == []
    assert tab("models pull qwen") == ["qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_completes(folder: Path, environment: dict[str, str]) -> None:
    script = "swift-gguf completion fish | source; complete -C 'swift-gguf {}'"

    def press(line: str) -> list[str]:
        command = ["fish", "-c", script.format(line)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, cwd=folder, env=environment
        )
        return [line.split("\t")[0] for line in done.stdout.splitlines()]

    assert press("ge") == ["generate"]
    assert press("generate sm") == ["smart.gguf", "smollm2-135m"]
    assert press("generate deep/down/") == ["deep/down/model.gguf"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_completes(folder: Path, environment: dict[str, str]) -> None:
    shell = pexpect.spawn(
        "zsh", ["-f", "-i"], cwd=folder, env=environment | {"TERM": "dumb"}, encoding="utf-8"
    )
    try:
        shell.sendline("PS1='$ '; autoload -U compinit; compinit -u -D")
        shell.sendline('eval "$(swift-gguf completion zsh)"; echo rea""dy')
        shell.expect("ready", timeout=60)
        for typed, expected in (
            ("ge", "generate"),
            ("generate smo", "smollm2-135m"),
            ("generate deep/down/", "deep/down/model.gguf"),
        ):
            shell.send(f"swift-gguf {typed}\t")
            shell.expect_exact(expected, timeout=60)
            shell.sendcontrol("c")
    finally:
        shell.close(force=True)


def test_a_shell_that_is_not_known_is_named(cli: CLI) -> None:
    done = cli("completion", SHELL="/bin/tcsh")
    assert done.returncode == 2
    assert "tcsh" in done.stderr
    assert cli("completion", SHELL="/usr/bin/fish").stdout.startswith("function _swift_gguf")


def test_every_command_has_examples_of_itself() -> None:
    for name, (module, attribute, _) in COMMANDS.items():
        command = getattr(import_module(f"swift_gguf.cli.{module}"), attribute)
        text = command.get_help(click.Context(command, info_name=f"swift-gguf {name}"))
        examples = text.partition("Examples:")[2]
        assert f"swift-gguf {name}" in examples, name
        assert all(len(line) <= 88 for line in examples.splitlines()), name


def test_examples_are_commands_that_parse() -> None:
    """Flags in examples exist: a line that does not parse would be a lie."""
    checked: set[str] = set()
    for name, (module, attribute, _) in COMMANDS.items():
        command = getattr(import_module(f"swift_gguf.cli.{module}"), attribute)
        for line in (command.epilog or "").splitlines():
            for part in re.findall(rf"swift-gguf {name}\b([^|>)#]*)", line):
                words = shlex.split(part)
                with command.make_context(name, words, parent=click.Context(root)):
                    checked.add(name)
    assert checked == set(COMMANDS)


def test_help_imports_little() -> None:
    """What takes time at the start is imports; time itself says as much of the machine."""
    code = (
        "import sys; from swift_gguf.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "Commands:" in done.stdout
    modules = done.stderr.split()
    heavy = {"numpy", "rich", "prompt_toolkit", "llama_cpp", "gguf", "huggingface_hub", "fastapi"}
    assert not heavy & set(modules)
    ours = {name for name in modules if name.startswith("swift_gguf.")}
    assert ours <= {"swift_gguf.cli", "swift_gguf.cli.help", "swift_gguf.errors"}
    assert len(modules) < 250
