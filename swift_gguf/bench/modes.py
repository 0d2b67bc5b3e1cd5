"""The modes of `swift-gguf bench` by name: ``auto``, ``ngram+layer-skip``, ``ngram:8``, ..."""

from __future__ import annotations

from dataclasses import dataclass

from swift_gguf.errors import SwiftError

PLAIN = "plain"
AUTO = "auto"
BARE = "auto-bare"
LOOKUP = "prompt-lookup"
SOURCES = ("layer-skip", "ngram", "recycling", "draft-model")
PEERS = {
    "llama-cpp-python": "llama_cpp.Llama, plain",
    LOOKUP: "llama_cpp.Llama with LlamaPromptLookupDecoding",
}

MAX_DRAFT = 64
SWEPT_SOURCES = (("layer-skip",), ("ngram",), ("recycling",), ("ngram", "layer-skip"))
SWEPT_LENGTHS = (2, 4, 8)


@dataclass(frozen=True)
class Mode:
    """A way to answer.  All modes are compared with plain decoding."""

    base: str
    """``plain``, ``auto``, ``auto-bare`` (no sidecar), a peer, or sources joined by ``+``."""
    draft_max: int | None = None
    """Maximum draft tokens; all other settings are then fixed, without a search.  None: default
    settings, with a search."""

    @property
    def name(self) -> str:
        return self.base if self.draft_max is None else f"{self.base}:{self.draft_max}"

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of drafts, if the mode names them."""
        return () if self.base in (PLAIN, AUTO, BARE, *PEERS) else tuple(self.base.split("+"))

    @property
    def is_fixed(self) -> bool:
        return self.draft_max is not None

    @property
    def is_peer(self) -> bool:
        """True for other programs, which do not promise the same text."""
        return self.base in PEERS


def parse_modes(text: str) -> list[Mode]:
    """Modes from a comma-separated list, without duplicates; plain decoding always comes first.

    Raises:
        SwiftError: there is no such mode.
    """
    named = [_parse(name.strip()) for name in text.split(",") if name.strip()]
    return list(dict.fromkeys([Mode(PLAIN), *named]))


def _parse(name: str) -> Mode:
    base, colon, length = name.partition(":")
    sources = base.split("+")
    is_single = base in (PLAIN, AUTO, BARE, *PEERS)
    if not is_single and (set(sources) - set(SOURCES) or len(set(sources)) < len(sources)):
        raise SwiftError(
            f"there is no mode {name!r}; use {', '.join((PLAIN, AUTO, BARE, *PEERS))}, "
            f"or {', '.join(SOURCES)} joined by +"
        )
    if not colon:
        return Mode(base)
    if is_single or not length.isdecimal() or not 1 <= int(length) <= MAX_DRAFT:
        raise SwiftError(
            f"{name!r} is not a fixed setting; write sources and a draft length from 1 to "
            f"{MAX_DRAFT}, as in ngram:8"
        )
    return Mode(base, int(length))


def sweep() -> list[Mode]:
    """The fixed settings; the best of them is the limit that `auto` is compared with."""
    return [Mode("+".join(names), n) for names in SWEPT_SOURCES for n in SWEPT_LENGTHS]
