"""`swift-gguf completion`."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from swift_gguf.cli.help import examples

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_SWIFT_GGUF_COMPLETE"
"""What click looks at: ``_SWIFT_GGUF_COMPLETE=bash_source swift-gguf`` prints the same."""


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
    """Print a script that lets Tab complete commands, flags, names of models and GGUF files.

    SHELL is bash (4.4 or newer), zsh or fish; without it, that of $SHELL.
    """
    shell = shell or Path(os.environ.get("SHELL", "")).name
    if shell not in SHELLS:
        raise click.UsageError(f"no completion for {shell or 'this shell'}; {', '.join(SHELLS)}")
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "swift-gguf", VARIABLE).source())
