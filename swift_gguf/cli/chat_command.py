"""`swift-gguf chat`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
from typing import TYPE_CHECKING, Any

import click

from swift_gguf.cli.help import examples, model_argument
from swift_gguf.cli.options import (
    answer_flags,
    load_model,
    model_flags,
    sampling_flags,
    sampling_options,
    speculation_flags,
    speculation_options,
    template_variables,
)
from swift_gguf.errors import ModelError, SwiftError

if TYPE_CHECKING:
    from swift_gguf.chat.chat import Chat
    from swift_gguf.chat.conversation import Conversation
    from swift_gguf.chat.terminal import Terminal
    from swift_gguf.model import Model


@click.command(
    epilog=examples(
        "swift-gguf chat smollm2-135m",
        "swift-gguf chat model.gguf -sys 'Answer in one sentence.' --temp 0.2",
        "swift-gguf chat hf:owner/repo/model-Q4_K_M.gguf -c 16384 --context stop",
        "swift-gguf chat model.gguf --resume",
        "printf '/read notes.md\\nSum that up.\\n' | swift-gguf chat model.gguf",
    )
)
@model_argument
@answer_flags
@click.option("--thinking", type=click.Choice(["fold", "show", "hide"]), default="fold",
              show_default=True,
              help="What happens to the model's thoughts when the answer begins.")  # fmt: skip
@click.option("--context", type=click.Choice(["shift", "stop"]), default="shift",
              show_default=True, help="When the context is full: drop the oldest turns (shift), "
              "or stop.")  # fmt: skip
@click.option("--resume", is_flag=False, flag_value="last", metavar="[NAME]",
              help="Go on with a conversation that was saved by /save; without NAME: with the "
              "one that the latest chat ended with.")  # fmt: skip
@click.option("--cache-disk", "cache_mib", default=1024, show_default=True, metavar="MIB",
              type=click.IntRange(0),
              help="Disk space for the KV states of saved conversations; 0: keep none, nor the "
              "conversation that this chat ends with.")  # fmt: skip
@click.option("--no-read-ahead", is_flag=True, help="Do not read the prompt while you type it.")
@speculation_flags
@sampling_flags
@model_flags
def chat(model: str, **values: Any) -> None:
    """Chat with a model.  Type /help for a list of commands.

    Without a terminal, each line of standard input is a message or a command.  Answers go to
    standard output, everything else to standard error.
    """
    from swift_gguf.chat import terminal
    from swift_gguf.chat.chat import Chat
    from swift_gguf.chat.kept import States, existing
    from swift_gguf.chat.screen import Plain
    from swift_gguf.chat.settings import Settings
    from swift_gguf.session import Session
    from swift_gguf.speculation import Speculation

    resumed = None if values["resume"] is None else existing(values["resume"])
    wanted = speculation_options(values)
    settings = Settings(
        sampling=sampling_options(values),
        n_predict=values["n_predict"],
        thinking=values["thinking"],
        context=values["context"],
        read_ahead=not values["no_read_ahead"],
        reasoning=values["reasoning"],
    )
    variables = template_variables(values | {"reasoning": "auto"})  # /set changes it later
    screen = terminal.Terminal() if terminal.is_usable() else None
    if screen:
        _leave_when_told()
    with ExitStack() as stack:
        loaded = stack.enter_context(load_model(model, values))
        conversation = _conversation(loaded, values, variables)
        session = stack.enter_context(closing(Session(loaded, Speculation(loaded, wanted))))
        states = States(limit=values["cache_mib"] << 20) if values["cache_mib"] else None
        talk = Chat(session, conversation, screen or Plain(), settings, states)
        if resumed:
            talk.load(resumed)
            if values["system_prompt"] is not None:
                conversation.system = values["system_prompt"]
        try:
            if screen:
                session.search_when_idle(talk.on_idle_step)
                _talk(talk, screen)
            else:
                _answer_lines(talk)
        finally:
            if screen:
                talk.keep_last()
            session.save()


def _conversation(model: Model, values: dict[str, Any], variables: dict[str, Any]) -> Conversation:
    from swift_gguf.chat.conversation import Conversation
    from swift_gguf.text import chat_template, read_template

    template = values["chat_template"] and read_template(values["chat_template"])
    if template is None and chat_template(model) is None:
        raise ModelError(
            f"{model.path} has no chat template; use generate --raw to continue a text, "
            "or give a template with --chat-template"
        )
    return Conversation(
        model,
        system=values["system_prompt"],
        template=template,
        variables=variables,
    )


def _leave_when_told() -> None:
    """On SIGTERM and SIGHUP, leaves in order: restores the terminal, saves what was learned."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda told, _: sys.exit(128 + told))


def _talk(talk: Chat, screen: Terminal) -> None:
    """The chat at a terminal."""
    from swift_gguf.chat.ahead import ReadAhead
    from swift_gguf.chat.commands import Leave, begun, handle
    from swift_gguf.chat.figures import footer
    from swift_gguf.chat.prompt import Prompt

    model = talk.session.model
    screen.note(f"{model.description}, {model.n_ctx} tokens of context; /help lists commands")
    with ReadAhead(talk.session, lambda line: begun(talk, line)) as ahead:
        prompt = Prompt(
            lambda width: footer(talk.current_figures(), width=width), on_change=ahead.changed
        )
        while True:
            try:
                with ahead.typing() if talk.settings.read_ahead else nullcontext():
                    line = prompt.ask()
                handle(talk, line)
            except (EOFError, Leave):
                return
            except KeyboardInterrupt:
                screen.note("Ctrl-D or /exit leaves")
            except (SwiftError, OSError) as error:
                screen.error(" ".join(str(error).split()))


def _answer_lines(talk: Chat) -> None:
    """The chat without a terminal: reads a message or a command a line."""
    from swift_gguf.chat.commands import Leave, handle

    try:
        for message in _messages():
            handle(talk, message)
            if talk.interrupted:
                raise KeyboardInterrupt
    except Leave:
        return


def _messages() -> Iterator[str]:
    """Messages from standard input: one a line, or several lines between triple quotes."""
    from swift_gguf.chat.commands import is_open
    from swift_gguf.cli.options import STANDARD_INPUT
    from swift_gguf.text_files import decode

    if sys.stdin is None:
        return
    is_person = sys.stdin.isatty()
    message = ""
    while True:
        if is_person:
            click.echo("... " if message else ">>> ", nl=False, err=True)
        line = sys.stdin.buffer.readline()
        message += decode(line, STANDARD_INPUT)
        if line and is_open(message):
            continue
        if message.strip():
            yield message.removesuffix("\n")
        message = ""
        if not line:
            return
