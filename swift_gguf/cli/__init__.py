"""The command line.  Each command turns its flags into a library call."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

import click

from swift_gguf.cli.help import examples
from swift_gguf.errors import SwiftError

# name -> (module, attribute, help); a module is imported only when its command runs: fast --help
COMMANDS = {
    "chat": ("chat_command", "chat", "Chat with a model."),
    "generate": ("generate_command", "generate", "Answer one prompt."),
    "serve": ("serve_command", "serve", "Serve a model over HTTP with OpenAI's API."),
    "llama-server": (
        "llama_server_command",
        "llama_server",
        "Serve a model with llama.cpp's own server, with drafts inside.",
    ),
    "bench": ("bench_command", "bench", "Measure the speed-up over plain decoding."),
    "tune": ("tune_command", "tune", "Find the layers that a model's drafts can skip."),
    "prepare": ("prepare_command", "prepare", "Make weights for faster drafts from a model."),
    "convert": ("convert_command", "convert", "Convert a Hugging Face checkpoint to GGUF."),
    "verify": ("verify_command", "verify", "Compare a GGUF with its checkpoint."),
    "info": ("info_command", "info", "Show a model's properties and skippable layers."),
    "models": ("models_command", "models", "List the models known by name, or download one."),
    "completion": ("completion_command", "completion", "Print a script for Tab completion."),
    "config": ("config_command", "config", "Print flags to compile and link a program."),
}


class Commands(click.Group):
    """A group that imports a command only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(import_module(f"swift_gguf.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, _, help) in COMMANDS.items()])


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from swift_gguf import __version__

        click.echo(f"swift-gguf {__version__}")
        ctx.exit()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "swift-gguf models pull smollm2-135m          # download a small model",
        "swift-gguf chat smollm2-135m                 # chat with it",
        "swift-gguf COMMAND --help                    # flags and examples",
    ),
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version)
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def root(debug: bool) -> None:
    """Run any GGUF model faster, with the same text, on the machine you have.

    MODEL is a path, hf:owner/repo[/file.gguf], or a name from `swift-gguf models`.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point.  Exit codes: 0 success; 1 failure; 2 wrong usage; 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # accepted anywhere on the line: people append it to a command that has failed
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # some terminals cannot show every character
    try:
        with _interrupts():
            sys.exit(root.main(arguments, prog_name="swift-gguf", standalone_mode=False))
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)
        sys.exit(130)
    except BrokenPipeError:
        # the reader has closed the pipe (`| head`); without this, Python's flush fails again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (SwiftError, click.ClickException, OSError, MemoryError, UnicodeError) as error:
        if debug:
            raise
        click.echo(f"swift-gguf: {_line(error)}", err=True)
        sys.exit(1)


@contextmanager
def _interrupts() -> Iterator[None]:
    """Turns an error that a Ctrl-C has caused back into KeyboardInterrupt.

    When Ctrl-C comes during an import, Python may raise RuntimeError, and an extension module
    may raise ImportError.  The import of torch takes seconds and can raise both.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise


def _line(error: BaseException) -> str:
    text = error.format_message() if isinstance(error, click.ClickException) else str(error)
    return " ".join(text.split()) or type(error).__name__
