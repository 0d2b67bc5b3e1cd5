"""The command line.  Commands are thin: each turns flags into one library call."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

import click

from swift_gguf.cli.help import examples
from swift_gguf.errors import SwiftError

# name -> (module, attribute, help); modules are imported when their command runs: --help is instant
COMMANDS = {
    "chat": ("chat_command", "chat", "Talk with a model."),
    "generate": ("generate_command", "generate", "Answer one prompt."),
    "serve": ("serve_command", "serve", "Serve a model over HTTP, as OpenAI's API."),
    "bench": ("bench_command", "bench", "Measure modes against plain decoding."),
    "tune": ("tune_command", "tune", "Find out what a model's drafts can leave out."),
    "prepare": ("prepare_command", "prepare", "Derive weights for faster drafts from a model."),
    "convert": ("convert_command", "convert", "Make a GGUF of a Hugging Face checkpoint."),
    "verify": ("verify_command", "verify", "Compare a GGUF with the checkpoint it was made of."),
    "info": ("info_command", "info", "Show what a model is and what of it can be skipped."),
    "models": ("models_command", "models", "List the models known by name, or fetch one."),
    "completion": ("completion_command", "completion", "Let Tab complete in your shell."),
    "config": ("config_command", "config", "Say how to compile and link a program with it."),
}


class Commands(click.Group):
    """Finds commands by name without importing the others."""

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
        "swift-gguf models pull smollm2-135m          # a small model to begin with",
        "swift-gguf chat smollm2-135m                 # talk with it",
        "swift-gguf COMMAND --help                    # every command has examples",
    ),
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version)
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
def root(debug: bool) -> None:
    """Any GGUF model, faster on the machine it already runs on, with the same text.

    MODEL is a path, hf:owner/repo[/file.gguf], or a name from `swift-gguf models`.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point.  Exit codes: 0; 1 a failure, in one line; 2 usage; 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # accepted anywhere on the line: people add it to the end of a command that failed
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
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
        # the reader went away (`| head`); Python would complain again while it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (SwiftError, click.ClickException, OSError, MemoryError, UnicodeError) as error:
        if debug:
            raise
        click.echo(f"swift-gguf: {_line(error)}", err=True)
        sys.exit(1)


@contextmanager
def _interrupts() -> Iterator[None]:
    """Raises those that became errors on their way.

    Of a Ctrl-C while a module is imported, Python makes a RuntimeError in some places, and
    extensions an ImportError: torch takes seconds, and has both.
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
