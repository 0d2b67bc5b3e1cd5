"""The chat's input line: several lines, history across sessions, completion, a footer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import TabsProcessor
from prompt_toolkit.output.color_depth import ColorDepth
from prompt_toolkit.styles import Style

from swift_gguf.chat.commands import COMMANDS, is_open
from swift_gguf.chat.kept import data_dir, names
from swift_gguf.chat.settings import CONTEXT, KEYS, THINKING

if TYPE_CHECKING:
    from prompt_toolkit.formatted_text import StyleAndTextTuples
    from prompt_toolkit.key_binding import KeyBindingsBase

STYLE = Style.from_dict(
    {
        "prompt": "bold",
        "placeholder": "ansibrightblack",
        "bottom-toolbar": "noreverse",
        "bottom-toolbar.text": "noreverse ansibrightblack",
        "completion-menu": "noinherit reverse",
    }
)
REFRESH_S = 1.0
"""How often the footer is updated."""


class Prompt:
    """Reads messages from the user.

    footer: returns the lines of the footer, for a width in columns.
    on_change: is called with the text after every change.
    """

    def __init__(
        self,
        footer: Callable[[int], list[str]],
        *,
        on_change: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._footer = footer
        self._session: PromptSession[str] = PromptSession(
            message=[("class:prompt", ">>> ")],
            multiline=True,
            prompt_continuation=lambda width, number, is_soft: (" " if is_soft else "... ").rjust(
                width
            ),
            history=history(data_dir() / "chat_history"),
            completer=ChatCompleter(),
            input_processors=[TabsProcessor(char1=" ", char2=" ")],
            complete_while_typing=False,
            key_bindings=bindings(),
            bottom_toolbar=self._toolbar,
            refresh_interval=REFRESH_S,
            placeholder=[("class:placeholder", "a message, or /help")],
            style=STYLE,
            color_depth=ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None,
        )
        buffer = self._session.default_buffer
        buffer.on_text_changed += lambda _: on_change(_without_surrogates(buffer.text))

    def ask(self) -> str:
        """A message from the user; it may have several lines.

        Raises:
            EOFError: Ctrl-D.
            KeyboardInterrupt: Ctrl-C.
        """
        return _without_surrogates(self._session.prompt())

    def _toolbar(self) -> StyleAndTextTuples:
        width = self._session.output.get_size().columns
        return [("class:bottom-toolbar.text", "\n".join(self._footer(width)))]


def _without_surrogates(text: str) -> str:
    """The text, with a replacement character for bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def bindings() -> KeyBindingsBase:
    """Enter sends the message, except inside triple quotes; Alt-Enter breaks the line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


class PrivateHistory(FileHistory):
    """A history that ignores write errors such as a full disk."""

    def store_string(self, string: str) -> None:
        """See `History`."""
        with suppress(OSError):
            super().store_string(string.encode("utf-8", "replace").decode())


def history(path: Path) -> History:
    """The history in a file that only its owner can read; in memory if that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)  # in case an existing file was readable for others
    except OSError:
        return InMemoryHistory()
    return PrivateHistory(str(path))


class ChatCompleter(Completer):
    """Completes commands, their arguments, and paths."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """See `Completer`."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, argument = text.partition(" ")
        if not space:
            for word in COMMANDS:
                if word.startswith(name):
                    end = " " if COMMANDS[word].argument else ""
                    yield Completion(word + end, -len(name), display=word)
        elif name == "/set":
            yield from _set_completions(argument)
        elif command := COMMANDS.get(name):
            if name in ("/save", "/load"):
                yield from _matching(names(), argument)
            if command.takes_path:
                yield from self._paths.get_completions(Document(argument), event)
            else:
                yield from _matching(command.values, argument.rpartition(",")[2])


def _set_completions(argument: str) -> Iterable[Completion]:
    key, space, value = argument.partition(" ")
    switch = ("on", "off")
    values = {"thinking": THINKING, "context": CONTEXT, "markdown": switch, "read-ahead": switch}
    return _matching(values.get(key, ()), value) if space else _matching(KEYS, key)


def _matching(words: Iterable[str], begin: str) -> Iterable[Completion]:
    return [Completion(word, -len(begin)) for word in words if word.startswith(begin)]
