"""`swift-gguf llama-server`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from swift_gguf.cli.help import examples, model_argument


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog=examples(
        "swift-gguf llama-server smollm2-135m",
        "swift-gguf llama-server model.gguf -- --port 9000 -np 4 --jinja",
        "swift-gguf llama-server model.gguf -- --spec-type swift,ngram-mod",
    ),
)
@model_argument
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def llama_server(model: str, arguments: tuple[str, ...]) -> None:
    """Serve a model with llama.cpp's own server, with drafts inside.

    ARGUMENTS are those of llama-server; put -- before them.
    """
    from swift_gguf.hub import resolve
    from swift_gguf.hub.progress import download_progress
    from swift_gguf.native.load import find_llama_server

    binary = find_llama_server()
    with download_progress() as progress:
        path = resolve(model, progress=progress)
    command = [str(binary), *server_flags(path, arguments), *arguments]
    os.execv(binary, command)


def server_flags(model: Path, arguments: Sequence[str]) -> list[str]:
    """What llama-server is told besides the user's own arguments.

    What the user gives in `arguments` is left to them.
    """
    from swift_gguf.errors import SidecarError
    from swift_gguf.gguf import sidecar
    from swift_gguf.gguf.identity import profile_key
    from swift_gguf.learning import Store

    beside = sidecar.path_beside(model)
    own: Path | None = None
    if beside.exists():
        try:
            own = sidecar.read(beside, model=model).path
        except SidecarError as error:
            click.echo(f"swift-gguf: warning: {error}", err=True)
    profile = Store().path(profile_key(model, own))
    profile.parent.mkdir(parents=True, exist_ok=True)
    flags = {
        "--model": str(model),
        "--spec-type": "swift",
        "--swift-profile": str(profile),
        "--swift-sidecar": str(own) if own else "none",
        # a cache of the window's size cannot take draft tokens back
        "--swa-full": "",
    }
    given = {argument.partition("=")[0] for argument in arguments}
    return [
        part for name, value in flags.items() if name not in given for part in (name, value) if part
    ]
