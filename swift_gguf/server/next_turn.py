"""Reads the beginning of a conversation's next prompt while the server has nothing else to do.

After an answer the client sends the conversation again, with the answer and the user's next
message.  All but that message is known.  What the context lacks of it is decoded in idle time: the
template's end of the answer and opening of the next turn, and where the template drops thoughts,
the answer without them.  A wrong guess costs idle time and changes no text.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from swift_gguf.errors import StoppedError, SwiftError
from swift_gguf.llama import Llama

BATCH = 128
"""Tokens in a batch at most.  A request stops the batch under way, whose work is then lost."""

MESSAGE = "\u2042 the next message \u2042"
"""Stands for the user's next message; what a template writes before it is known."""

_log = logging.getLogger("swift_gguf")


class NextTurn:
    """The next turn of the conversation that was answered last.

    `step` is called in the thread of idle work, all else in the thread of the jobs, while the model
    is its own.
    """

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self._chat: dict[str, Any] | None = None
        self._tokens: list[int] | None = None
        self.n_read = 0
        """Tokens read ahead so far."""

    def follows(self, chat: Mapping[str, Any], answer: str) -> None:
        """The chat was answered.

        chat: arguments of `Llama.create_chat_completion` that its prompt depends on.
        """
        turns = ({"role": "assistant", "content": answer}, {"role": "user", "content": MESSAGE})
        self._chat = {**chat, "messages": [*chat["messages"], *turns]}
        self._tokens = None

    def forget(self) -> None:
        """Another prompt came."""
        self._chat = self._tokens = None

    def step(self) -> bool:
        """Reads a batch.  False: there is nothing to read.

        Raises:
            StoppedError: a request came.
        """
        if self._chat is None:
            return False
        try:
            if self._tokens is None:
                self._tokens = self._llama.chat_tokens(self._chat, up_to=MESSAGE)
            n_read = self._llama.read_ahead(self._tokens, most=BATCH)
        except StoppedError:
            raise
        except (SwiftError, ValueError) as error:  # such as a template that refuses these turns
            _log.debug("the next turn is not read ahead: %s", error)
            n_read = 0
        self.n_read += n_read
        if n_read == 0:
            self.forget()
        return n_read > 0
