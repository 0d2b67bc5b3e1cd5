"""The chat's commands: lines that begin with a slash."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swift_gguf.chat.chat import Chat
from swift_gguf.chat.kept import existing, writable
from swift_gguf.chat.reader import read
from swift_gguf.errors import SwiftError
from swift_gguf.speculation import SOURCES, Speculation

QUOTES = '"""'


class Leave(Exception):
    """Raised by /exit."""


@dataclass(frozen=True)
class Command:
    """A command: its argument, its help text, and its function."""

    argument: str
    help: str
    run: Callable[[Chat, str], None]
    takes_path: bool = False
    values: tuple[str, ...] = ()
    """Completions of the argument."""


def handle(chat: Chat, line: str) -> None:
    """Runs a command, or sends a message.

    Raises:
        Leave: the command was /exit.
        SwiftError: the command failed, or there is no such command.
    """
    line = unquoted(line)
    command = _parsed(line)
    if command is None:
        if line.strip():
            chat.say(line)
        return
    name, argument = command
    if name not in COMMANDS:
        raise SwiftError(f"there is no command {name}; /help lists them")
    COMMANDS[name].run(chat, argument)


def begun(chat: Chat, line: str) -> list[int]:
    """Tokens that the next prompt begins with while `line` is typed; see `Chat.begun`.

    Raises:
        SwiftError: it names a file that cannot be read, or the template refuses the message.
    """
    command = _parsed(line)
    if command is None:
        return chat.begun(_opened(line) if is_open(line) else unquoted(line))
    name, argument = command
    return chat.begun("", *([_path(argument, name)] if name == "/read" else []))


def _parsed(line: str) -> tuple[str, str] | None:
    """The name of a command and its argument; None if the line is a message."""
    name, _, argument = line.strip().partition(" ")
    if not name.startswith("/") or "/" in name[1:] or "\n" in name:  # a path is not a command
        return None
    return ALIASES.get(name, name), argument.strip()


def _opened(line: str) -> str:
    """A message whose triple quotes are not closed yet, without them."""
    return line.strip()[len(QUOTES) :].lstrip("\n")


def unquoted(line: str) -> str:
    """A message without its triple quotes."""
    stripped = line.strip()
    if is_open(stripped) or not stripped.startswith(QUOTES) or len(stripped) < 2 * len(QUOTES):
        return line
    return stripped[len(QUOTES) : -len(QUOTES)].strip("\n")


def is_open(text: str) -> bool:
    """True if `text` begins with triple quotes that are not closed yet."""
    stripped = text.strip()
    if not stripped.startswith(QUOTES):
        return False
    return len(stripped) < 2 * len(QUOTES) or not stripped.endswith(QUOTES)


def help_lines() -> list[str]:
    """The lines of /help."""
    rows = [(f"{name} {command.argument}", command.help) for name, command in COMMANDS.items()]
    rows += [
        ('"""', "around several lines; Alt-Enter also breaks a line"),
        ("Ctrl-C", "stops the answer and keeps its text"),
        ("Ctrl-D", "leaves the chat"),
    ]
    return [f"{left:<20} {right}" for left, right in rows]


def _path(argument: str, command: str) -> Path:
    try:
        words = shlex.split(argument)
    except ValueError:  # an unpaired quote, as in an apostrophe
        words = [argument]
    if not argument:
        raise SwiftError(f"{command} needs a file name")
    return Path(words[0] if len(words) == 1 else argument)


def _read(chat: Chat, argument: str) -> None:
    chat.attach(_path(argument, "/read"))


def _save(chat: Chat, argument: str) -> None:
    chat.save(writable(str(_path(argument, "/save"))))


def _load(chat: Chat, argument: str) -> None:
    if argument:
        chat.load(existing(str(_path(argument, "/load"))))
    else:
        chat.screen.lines(chat.saved())


def _clear(chat: Chat, _: str) -> None:
    chat.clear()
    chat.screen.note("the conversation is deleted")


def _undo(chat: Chat, _: str) -> None:
    if n_files := chat.detach():
        files = "the attached file" if n_files == 1 else f"{n_files} attached files"
        chat.screen.note(f"removed: {files}")
        return
    turn = chat.conversation.undo()
    if turn is None:
        raise SwiftError("there is nothing to undo")
    chat.screen.note(f"removed: {_shortened(turn.user)}")


def _shortened(text: str, n: int = 50) -> str:
    text = " ".join(text.split())
    return text if len(text) <= n else text[: n - 1] + "…"


def _system(chat: Chat, argument: str) -> None:
    if argument:
        chat.conversation.system = None if argument == "none" else unquoted(argument)
    system = chat.conversation.system
    chat.screen.note(f"system message: {_shortened(system)}" if system else "no system message")


def _set(chat: Chat, argument: str) -> None:
    key, _, value = argument.partition(" ")
    if not key:
        chat.screen.lines([f"{key:<20} {value}" for key, value in chat.settings.values().items()])
        return
    if not value.strip():
        raise SwiftError("/set needs a key and a value, as in /set temp 0.2; /set alone lists all")
    chat.settings = chat.settings.set(key, value.strip())
    key = key.lower().replace("_", "-")
    chat.screen.note(f"{key} is {chat.settings.values()[key]}")


def _speculation(chat: Chat, argument: str) -> None:
    model = chat.session.model
    if argument:
        chat.speculate(argument, lambda options: Speculation(model, options))
    speculation = chat.session.speculation
    with chat.session.exclusive():
        chat.screen.note(f"speculation: {speculation.why if speculation else 'switched off'}")


def _show(chat: Chat, argument: str) -> None:
    if argument == "thinking":
        turns = chat.conversation.turns
        parts = read(chat.session.model, turns[-1].tokens)[0] if turns else []
        thought = "".join(part.text for part in parts if part.is_thought)
        if not thought:
            raise SwiftError("the latest answer has no thoughts")
        chat.screen.lines([thought])
    elif argument:
        raise SwiftError(
            "use /show for the sources of the latest answer, or /show thinking for its thoughts"
        )
    else:
        chat.screen.sources(*chat.show())


def _leave(chat: Chat, _: str) -> None:
    raise Leave


COMMANDS = {
    "/help": Command("", "shows this list", lambda chat, _: chat.screen.lines(help_lines())),
    "/clear": Command("", "deletes the conversation; keeps the system message", _clear),
    "/regen": Command("", "answers the latest message again", lambda chat, _: chat.regenerate()),
    "/undo": Command("", "removes the latest message and its answer", _undo),
    "/read": Command("FILE", "attaches a text file to the next message", _read, takes_path=True),
    "/system": Command("TEXT", "sets the system message; none: removes it", _system),
    "/set": Command("KEY VALUE", "changes a setting; without KEY: lists all", _set),
    "/save": Command("NAME", "saves the conversation; a FILE will do, too", _save, takes_path=True),
    "/load": Command("NAME", "goes on with a saved one; without NAME: lists them", _load,
                     takes_path=True),
    "/stats": Command("", "statistics of the latest answer and the session",
                      lambda chat, _: chat.screen.lines(chat.stats())),
    "/speculation": Command("MODE", "sets the draft sources: auto, off, or a list with commas",
                            _speculation, values=("auto", "off", *SOURCES)),
    "/show": Command("[thinking]", "colours the latest answer by source; or its thoughts", _show,
                     values=("thinking",)),
    "/exit": Command("", "leaves the chat", _leave),
}  # fmt: skip

ALIASES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help"}
