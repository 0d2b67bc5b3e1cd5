"""`swift-gguf models`: list the models that have a name, and download them."""

from __future__ import annotations

import json

import click

from swift_gguf.cli.help import complete_model, examples
from swift_gguf.hub import models as library
from swift_gguf.hub.progress import download_progress


@click.group(
    "models",
    invoke_without_command=True,
    epilog=examples("swift-gguf models", "swift-gguf models pull smollm2-135m"),
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
@click.pass_context
def models(context: click.Context, as_json: bool) -> None:
    """List the models that have a name; `pull` downloads one.

    Every command also takes a path, hf:owner/repo or hf:owner/repo/file.gguf.
    """
    if context.invoked_subcommand is not None:
        if as_json:
            raise click.UsageError("--json is for the list, not for a subcommand")
        return
    click.echo(_as_json() if as_json else _as_table())


@models.command(
    epilog=examples(
        "swift-gguf models pull smollm2-135m",
        "swift-gguf models pull hf:owner/repo/model-Q4_K_M.gguf",
    )
)
@click.argument("name", shell_complete=complete_model)
def pull(name: str) -> None:
    """Download a model and print its path.

    NAME is a name from the list, or hf:owner/repo[/file.gguf].
    """
    with download_progress(name) as progress:
        path = library.resolve(name, progress=progress)
    click.echo(path)


def _as_json() -> str:
    rows = []
    for entry in library.registry():
        path = library.installed(entry)
        rows.append(
            {
                "name": entry.name,
                "size_bytes": entry.size,
                "quantization": entry.quantization,
                "installed": path is not None,
                "path": None if path is None else str(path),
                "description": entry.description,
            }
        )
    return json.dumps(rows, indent=2)


def _as_table() -> str:
    rows = [("NAME", "SIZE", "FORMAT", "INSTALLED", "DESCRIPTION")]
    for entry in library.registry():
        here = "yes" if library.installed(entry) else "no"
        rows.append(
            (entry.name, _readable(entry.size), entry.quantization, here, entry.description)
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for name, size, *rest in rows:
        cells = [name.ljust(widths[0]), size.rjust(widths[1])]
        cells += [cell.ljust(width) for cell, width in zip(rest, widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
