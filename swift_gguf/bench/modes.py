"""What `swift-gguf bench` compares, by name: ``auto``, ``ngram+layer-skip``, ``ngram:8``, ..."""

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
    """A way to answer; of several, plain decoding is what the others are compared with."""

    base: str
    """``plain``, ``auto``, ``auto-bare`` (no sidecar), a peer, or sources joined by ``+``."""
    draft_max: int | None = None
    """Tokens of a draft at most, all else fixed too: no search goes on.  None: the default, and a
    search."""

    @property
    def name(self) -> str:
        return self.base if self.draft_max is None else f"{self.base}:{self.draft_max}"

    @property
    def sources(self) -> tuple[str, ...]:
        """What drafts, if it is named."""
        return () if self.base in (PLAIN, AUTO, BARE, *PEERS) else tuple(self.base.split("+"))

    @property
    def is_fixed(self) -> bool:
        return self.draft_max is not None

    @property
    def is_peer(self) -> bool:
        """Other people's code, which promises nothing of its text."""
        return self.base in PEERS


def parse_modes(text: str) -> list[Mode]:
    """Modes from a comma list, each once; plain decoding comes first, named or not.

    Raises:
        SwiftError: a name is none.
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
            f"{name!r} fixes nothing; a draft's length goes from 1 to {MAX_DRAFT}, "
            "after sources: ngram:8"
        )
    return Mode(base, int(length))


def sweep() -> list[Mode]:
    """The fixed settings, of which the best is the limit that `auto` is held against."""
    return [Mode("+".join(names), n) for names in SWEPT_SOURCES for n in SWEPT_LENGTHS]
