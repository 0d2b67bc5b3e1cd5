"""Shared by commands: examples below the flags, and Tab completion of models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])


def examples(*lines: str) -> str:
    """The epilog of a command's help: one example command a line."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def complete_model(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Completions of MODEL: names of the registry, GGUF files, and folders."""
    from click.shell_completion import CompletionItem

    from swift_gguf.hub import registry

    named = [
        CompletionItem(entry.name, help=entry.description)
        for entry in registry()
        if entry.name.startswith(incomplete)
    ]
    return [*named, *map(CompletionItem, _paths(incomplete))]


def _paths(incomplete: str) -> list[str]:
    """GGUF files and folders that begin with `incomplete`.

    A shell adds a space after the only completion.  If that is a folder, its files are listed
    too, so that the user can go on typing.
    """
    start = incomplete.rpartition("/")[2]
    typed = incomplete[: len(incomplete) - len(start)]
    try:
        found = sorted(Path(typed or ".").expanduser().iterdir())
    except (OSError, RuntimeError):  # no access to the folder; no such user
        return []
    shown = [path for path in found if path.name.startswith(start)]
    if not start.startswith("."):
        shown = [path for path in shown if not path.name.startswith(".")]
    folders = [f"{typed}{path.name}/" for path in shown if path.is_dir()]
    files = [typed + path.name for path in shown if path.suffix == ".gguf" and path.is_file()]
    if len(folders) == 1 and not files and folders[0] != incomplete:
        return folders + _paths(folders[0])
    return folders + files


def model_argument(function: F) -> F:
    """MODEL: a path, hf:owner/repo[/file.gguf], or a name."""
    return click.argument("model", shell_complete=complete_model)(function)
