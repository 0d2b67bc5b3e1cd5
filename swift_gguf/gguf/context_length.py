"""How long a context of a model may be, by its file.

Most models turn keys by their position (RoPE): they run at any length, and answer badly beyond the
one that they were trained for.  Some add a learned vector for each position (GPT-2, StarCoder): of
those there are as many as they were trained for, and llama.cpp aborts where one more is asked for.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from swift_gguf.gguf.header import Header

DEFAULT_CONTEXT = 4096

CONTEXT_STEP = 256
"""llama.cpp makes contexts of multiples of this."""

_UNKNOWN = 512  # llama.cpp's n_ctx, too
_LEARNED = frozenset({"gpt2", "starcoder"})  # the table may be in another part of a split file
_TABLE = "position_embd.weight"

_log = logging.getLogger("swift_gguf")


@dataclass(frozen=True, kw_only=True)
class ContextLength:
    """Lengths in tokens."""

    trained: int | None
    """None: the file does not say."""
    limit: int | None
    """Learned positions; None: there are none."""
    scaled: bool = False
    """Does the file tell how to scale RoPE beyond the length of its training?"""

    def choose(self, wanted: int | None) -> int:
        """A context's length.

        wanted: None: `DEFAULT_CONTEXT`, or as long as the model was trained for, if that is less;
            0: as long as it was trained for.
        """
        if wanted is None:
            wanted = min(DEFAULT_CONTEXT, self.trained or DEFAULT_CONTEXT)
        return self.usable(padded(wanted or self.trained or _UNKNOWN))

    def usable(self, n_ctx: int) -> int:
        """How much of a context of `n_ctx` may be filled."""
        return min(n_ctx, self.limit or n_ctx)

    def warn(self, path: Path | str, wanted: int | None) -> None:
        """A line for a length that was asked for, if the model is not good for it."""
        if not wanted or not self.trained or wanted <= self.trained:
            return
        if self.limit:
            _log.warning("%s has %d positions: its context is no longer", path, self.limit)
        elif not self.scaled:
            _log.warning(
                "%s was trained for %d tokens: beyond them its answers may be nonsense",
                path,
                self.trained,
            )


def context_length(header: Header) -> ContextLength:
    """How long contexts of the model may be."""
    trained = header.integer("context_length") or None
    has_table = _TABLE in header.tensors or header.architecture in _LEARNED
    return ContextLength(
        trained=trained,
        limit=trained if has_table else None,
        scaled=header.get("rope.scaling.type", "none") != "none",
    )


def padded(n_ctx: int) -> int:
    """A context's size as llama.cpp makes it, but before it limits n_batch."""
    return -(-n_ctx // CONTEXT_STEP) * CONTEXT_STEP
