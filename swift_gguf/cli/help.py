"""What commands show and offer alike: examples below their flags, and what Tab completes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])


def examples(*lines: str) -> str:
    """An epilog with commands as they are typed; what ``#`` begins says what for."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def complete_model(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Names of the registry, GGUF files, and the folders they may be in."""
    from click.shell_completion import CompletionItem

    from swift_gguf.hub import registry

    named = [
        CompletionItem(entry.name, help=entry.description)
        for entry in registry()
        if entry.name.startswith(incomplete)
    ]
    return [*named, *map(CompletionItem, _paths(incomplete))]


def _paths(incomplete: str) -> list[str]:
    """As they were begun; below a folder that is the only one, too.

    Shells write a space after the only completion: with its files beside it, a folder is not.
    """
    start = incomplete.rpartition("/")[2]
    typed = incomplete[: len(incomplete) - len(start)]
    try:
        found = sorted(Path(typed or ".").expanduser().iterdir())
    except (OSError, RuntimeError):  # not a folder of ours; no such user
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
