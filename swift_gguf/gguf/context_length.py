"""The maximum context length of a model.

Most models rotate keys by their position (RoPE).  They run at any length, but answer badly beyond
the length of their training.  Some models (GPT-2, StarCoder) add a learned vector per position.
They have only as many as they were trained for, and llama.cpp aborts beyond the last one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from swift_gguf.gguf.header import Header

DEFAULT_CONTEXT = 4096

CONTEXT_STEP = 256
"""llama.cpp rounds context sizes up to a multiple of this."""

_UNKNOWN = 512  # llama.cpp's default n_ctx
_LEARNED = frozenset({"gpt2", "starcoder"})  # the table may be in another part of a split file
_TABLE = "position_embd.weight"

_log = logging.getLogger("swift_gguf")


@dataclass(frozen=True, kw_only=True)
class ContextLength:
    """A model's context lengths, in tokens."""

    trained: int | None
    """Context length of the training; None: the file does not say."""
    limit: int | None
    """Number of learned positions; None: the model has none."""
    scaled: bool = False
    """True if the file has RoPE scaling for longer contexts."""

    def choose(self, wanted: int | None) -> int:
        """The context length to use.

        wanted: the requested length; 0: the training's; None: `DEFAULT_CONTEXT`, or the training's
            if that is less.
        """
        if wanted is None:
            wanted = min(DEFAULT_CONTEXT, self.trained or DEFAULT_CONTEXT)
        return self.usable(padded(wanted or self.trained or _UNKNOWN))

    def usable(self, n_ctx: int) -> int:
        """Number of tokens that fit a context of size `n_ctx`."""
        return min(n_ctx, self.limit or n_ctx)

    def warn(self, path: Path | str, wanted: int | None) -> None:
        """Logs a warning if the requested length is too long for the model."""
        if not wanted or not self.trained or wanted <= self.trained:
            return
        if self.limit:
            _log.warning("%s has %d positions: its context is limited to them", path, self.limit)
        elif not self.scaled:
            _log.warning(
                "%s was trained for %d tokens; in a longer context its answers may be nonsense",
                path,
                self.trained,
            )


def context_length(header: Header) -> ContextLength:
    """The context lengths of a model."""
    trained = header.integer("context_length") or None
    has_table = _TABLE in header.tensors or header.architecture in _LEARNED
    return ContextLength(
        trained=trained,
        limit=trained if has_table else None,
        scaled=header.get("rope.scaling.type", "none") != "none",
    )


def padded(n_ctx: int) -> int:
    """A context size, rounded up as llama.cpp does."""
    return -(-n_ctx // CONTEXT_STEP) * CONTEXT_STEP
