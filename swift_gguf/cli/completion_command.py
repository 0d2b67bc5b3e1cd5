"""`swift-gguf completion`."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from swift_gguf.cli.help import examples

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_SWIFT_GGUF_COMPLETE"
"""click's own variable: ``_SWIFT_GGUF_COMPLETE=bash_source swift-gguf`` prints the script too."""


@click.command(
    epilog=examples(
        """eval "$(swift-gguf completion bash)"     # in ~/.bashrc""",
        """eval "$(swift-gguf completion zsh)"      # in ~/.zshrc, after compinit""",
        """swift-gguf completion fish > ~/.config/fish/completions/swift-gguf.fish""",
    )
)
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.pass_context
def completion(context: click.Context, shell: str | None) -> None:
    """Print a script for Tab completion of commands, flags, model names and GGUF files.

    SHELL is bash (4.4 or newer), zsh or fish.  The default comes from $SHELL.
    """
    shell = shell or Path(os.environ.get("SHELL", "")).name
    if shell not in SHELLS:
        raise click.UsageError(
            f"no completion for {shell or 'this shell'}; use one of {', '.join(SHELLS)}"
        )
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "swift-gguf", VARIABLE).source())
