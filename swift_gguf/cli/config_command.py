"""`swift-gguf config`: where the installed library and its headers are."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from swift_gguf.cli.help import complete_model, examples
from swift_gguf.errors import NativeLibraryError, SwiftError


@click.command(
    epilog=examples(
        "cc app.c $(swift-gguf config --cflags --libs)",
        'cmake -B build -Dswift_gguf_DIR="$(swift-gguf config --cmake-dir)"',
        "$(swift-gguf config --llama-server) -m model.gguf --spec-type swift",
    )
)
@click.option("--cflags", is_flag=True, help="Print compiler flags.")
@click.option("--libs", is_flag=True, help="Print linker flags.  They contain the library's "
              "present folder as rpath.")  # fmt: skip
@click.option("--cmake-dir", is_flag=True, help="Print the folder for CMake's -Dswift_gguf_DIR.")
@click.option("--pkgconfig-dir", is_flag=True, help="Print the folder for PKG_CONFIG_PATH.")
@click.option("--lib-dir", is_flag=True,
              help="Print the folder of libllama; other bindings can use it too.")  # fmt: skip
@click.option("--include-dir", is_flag=True, help="Print the folder of swift_gguf.h and llama.h.")
@click.option("--llama-server", is_flag=True,
              help="Print the path of llama-server, for apps that ask for one.")  # fmt: skip
@click.option("--profile", metavar="MODEL", shell_complete=complete_model,
              help="Print the path of the file with a model's measurements.")  # fmt: skip
def config(profile: str | None, **wanted: bool) -> None:
    """Print flags to compile and link a program with swift_gguf.h."""
    if wanted.pop("llama_server"):
        from swift_gguf.native.load import find_llama_server

        click.echo(find_llama_server())
    elif any(wanted.values()) or not profile:
        values = _values()
        if not any(wanted.values()):
            lines = [f"{name.replace('_', '-'):14} {value}" for name, value in values.items()]
        else:  # on one line, like pkg-config
            lines = [" ".join(value for name, value in values.items() if wanted[name])]
        click.echo("\n".join(lines))
    if profile:
        click.echo(_profile(profile))


def _values() -> dict[str, str]:
    """What each flag prints.

    Raises:
        NativeLibraryError: there is no library, or its headers are missing.
    """
    from swift_gguf.native.load import REINSTALL, find_library

    lib = find_library().resolve()
    include = lib.parent / "include"
    if not (include / "swift_gguf.h").exists():
        raise NativeLibraryError(f"{lib} has no headers in {include}; {REINSTALL}")
    libs = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lllama", "-lggml", "-lggml-base"]
    return {
        "cflags": shlex.join([f"-I{include}"]),
        "libs": shlex.join(libs),
        "cmake_dir": str(lib / "cmake" / "swift_gguf"),
        "pkgconfig_dir": str(lib / "pkgconfig"),
        "lib_dir": str(lib),
        "include_dir": str(include),
    }


def _profile(reference: str) -> Path:
    """The path of a model's profile; the sidecar beside the model counts if it belongs to it.

    Raises:
        SwiftError: the model has no profile yet.
    """
    from swift_gguf.errors import SidecarError
    from swift_gguf.gguf import sidecar
    from swift_gguf.gguf.identity import profile_key
    from swift_gguf.hub import resolve
    from swift_gguf.learning import Store

    model = resolve(reference)
    beside = sidecar.path_beside(model)
    try:
        own = sidecar.read(beside, model=model).path if beside.exists() else None
    except SidecarError:
        own = None
    path = Store().path(profile_key(model, own))
    if not path.exists():
        raise SwiftError(f"{model.name} has no profile yet; run swift-gguf tune {reference}")
    return path
