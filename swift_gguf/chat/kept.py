"""The user's folder of conversations: their names, and the states of their contexts.

A conversation's file holds its text, and is enough to go on.  The state of its context only saves
the time to process that text again.  So states may be thrown away at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from swift_gguf.errors import StateError, SwiftError
from swift_gguf.session import Session

LAST = "last"
"""The name of the conversation that the latest chat ended with."""
MIN_TOKENS = 64
"""A state is not kept for fewer tokens, because processing them again takes little time."""

_NAME = re.compile(r"[^~./\\-][^./\\]*")
_log = logging.getLogger("swift_gguf")


def data_dir() -> Path:
    """The folder of conversations and of the chat history: `$SWIFT_GGUF_DATA`, or the user's data
    folder."""
    if folder := os.environ.get("SWIFT_GGUF_DATA"):
        return Path(folder).expanduser()
    import platformdirs

    return platformdirs.user_data_path("swift-gguf")


def private(folder: Path) -> Path:
    """Makes a folder that only its owner can open.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)  # in case it was open for others
    return folder


# -- names -----------------------------------------------------------------------------------------


def place(argument: str) -> Path:
    """The file of a conversation.  A word without dots and slashes is a name in the user's folder;
    everything else is a path."""
    if _NAME.fullmatch(argument):
        return data_dir() / "conversations" / f"{argument}.json"
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:  # ~user, and there is no such user
        raise SwiftError(f"{argument} cannot be found: {error}") from error


def writable(argument: str) -> Path:
    """As `place`, in a folder that exists.

    Raises:
        SwiftError: the user's folder cannot be made.
    """
    path = place(argument)
    try:
        if _NAME.fullmatch(argument):
            private(path.parent)
    except OSError as error:
        raise SwiftError(f"{path.parent} cannot be made: {error.strerror or error}") from error
    return path


def existing(argument: str) -> Path:
    """As `place`, for a conversation that is there.

    Raises:
        SwiftError: there is no conversation of this name.
    """
    path = place(argument)
    if _NAME.fullmatch(argument) and not path.exists():
        known = ", ".join(names())
        there = f"there are: {known}" if known else "/save NAME saves one"
        raise SwiftError(f"there is no saved conversation {argument!r}; {there}")
    return path


def names() -> list[str]:
    """The names of the conversations in the user's folder, the latest first."""
    found = []
    with suppress(OSError):
        for path in (data_dir() / "conversations").glob("*.json"):
            if _NAME.fullmatch(path.stem):
                found.append((path.stat().st_mtime, path.stem))
    return [name for _, name in sorted(found, reverse=True)]


# -- states ----------------------------------------------------------------------------------------


class States:
    """States of conversations' contexts in a folder, of at most `limit` bytes in all.

    Those that were not used for longest are thrown away first.
    """

    def __init__(self, *, limit: int, folder: Path | None = None) -> None:
        self.limit = limit
        self.folder = folder or data_dir() / "states"

    def path(self, conversation: Path) -> Path:
        """The state of a conversation's file.  It may not exist."""
        name = hashlib.sha256(os.fsencode(conversation.absolute())).hexdigest()[:32]
        return self.folder / f"{name}.state"

    def size(self, conversation: Path) -> int:
        """Bytes; 0: there is no state."""
        with suppress(OSError):
            return self.path(conversation).stat().st_size
        return 0

    def save(
        self, conversation: Path, session: Session, *, n_tokens: int, notes: Mapping[str, Any]
    ) -> int:
        """Saves the state of the context's first `n_tokens` tokens.  Returns its size in bytes.

        Raises:
            SwiftError: it is too large, or cannot be saved.
            OSError: it cannot be written.
        """
        private(self.folder)
        path = self.path(conversation)
        size = session.save_state(path, n_tokens=n_tokens, notes=notes, limit=self.limit)
        self._make_room()
        return size

    def load(self, conversation: Path, session: Session) -> Mapping[str, Any] | None:
        """Replaces the context by the state of a conversation.  Returns the notes saved with it.

        None: there is no state that can be used.  One that cannot is removed.
        """
        path = self.path(conversation)
        try:
            notes = session.load_state(path)
            os.utime(path)  # it was used
            return notes
        except FileNotFoundError:
            return None
        except (OSError, StateError) as error:
            _log.debug("the state %s is not used: %s", path, error)
            self.forget(conversation)
            return None

    def forget(self, conversation: Path) -> None:
        """Removes the state of a conversation, if there is one."""
        with suppress(OSError):
            self.path(conversation).unlink(missing_ok=True)

    def _make_room(self) -> None:
        total = 0
        for path in self._latest_first():
            with suppress(OSError):
                total += path.stat().st_size
                if total > self.limit:
                    path.unlink(missing_ok=True)

    def _latest_first(self) -> list[Path]:
        """All files of the folder: also what a process left that was killed while it wrote."""
        found = []
        for path in self.folder.iterdir():
            with suppress(OSError):
                found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found, reverse=True)]
