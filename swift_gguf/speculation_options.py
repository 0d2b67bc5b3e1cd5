"""What the user may ask of speculation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from swift_gguf.drafting import draft_model, layer_skip
from swift_gguf.drafting.ngram import NGram
from swift_gguf.drafting.recycling import Recycling
from swift_gguf.drafting.tree import Shape, caterpillar
from swift_gguf.errors import SwiftError
from swift_gguf.search.paper import PaperOptions

SOURCES = (NGram.name, Recycling.name, layer_skip.NAME, draft_model.NAME)

TREES = {
    "chain": Shape(n_nodes=0),
    "caterpillar": Shape(n_nodes=0, branching=caterpillar, only_first_extends=True),
    "best-first": Shape(n_nodes=0, branching=lambda top: 3),
}
"""Shapes of drafts by name; how many nodes they get is the engine's to say."""

MOST_DRAFTED = 64
"""The kernels that round alike at every width (native/cpu) take a few columns more at most."""


@dataclass(frozen=True, kw_only=True)
class SpeculationOptions:
    """What the user asked for.

    Raises:
        SwiftError: a source that does not exist, or one that lacks what it needs; too long drafts.
    """

    mode: str = "auto"
    """``off``; ``auto``: every source the model allows, where it pays; or sources by name, joined
    by commas (`SOURCES`), which then draft whether it pays or not."""
    skip_attn: frozenset[int] | None = None
    skip_ffn: frozenset[int] | None = None
    """A sub-network of the user's own; both None: the profile's, and what the search finds."""
    draft_model: Path | None = None
    """A smaller model of the same family, for the source ``draft-model``."""
    search: str = "auto"
    """``auto``; ``paper``: SWIFT's, to compare with; ``off``."""
    paper: PaperOptions = field(default_factory=PaperOptions)
    draft_max: int | None = None
    """At most `MOST_DRAFTED`; None: the planner's to say."""
    p_min: float | None = None
    """Stop drafting below this probability; None: where a token costs more than it promises."""
    tree: str | None = None
    """One of `TREES`; None: the planner's to say."""
    fixed: bool = False
    """Draft `draft_max` tokens where there are so many, whatever they cost; to compare with."""
    sidecar: bool = True
    """Draft with the model's sidecar, if it has one; False: to compare with."""
    sampled: bool = False
    """Drafts are drawn, for speculative sampling; by layer-skip alone."""

    def __post_init__(self) -> None:
        unknown = set(self.sources) - set(SOURCES)
        if unknown and self.mode != "off":
            raise SwiftError(
                f"there is no source of drafts {sorted(unknown)[0]!r}; use auto, off, or "
                f"{', '.join(SOURCES)}, joined by commas"
            )
        if self.draft_max is not None and not 1 <= self.draft_max <= MOST_DRAFTED:
            raise SwiftError(f"drafts of {self.draft_max} tokens; give 1 to {MOST_DRAFTED}")
        if draft_model.NAME in self.sources and self.draft_model is None:
            raise SwiftError("--speculation draft-model needs --draft-model PATH")

    @property
    def sources(self) -> tuple[str, ...]:
        """What may draft."""
        if self.mode != "auto":
            return tuple(dict.fromkeys(name.strip() for name in self.mode.split(",")))
        speaks_of_it = (self.p_min, self.tree, self.skip_attn, self.skip_ffn)
        if self.sampled or self.search == "paper" or any(x is not None for x in speaks_of_it):
            return (layer_skip.NAME,)
        return tuple(name for name in SOURCES if name != draft_model.NAME or self.draft_model)

    @property
    def is_auto(self) -> bool:
        """May the planner decode plainly?"""
        return self.mode == "auto" and len(self.sources) > 1

    @property
    def is_by_hand(self) -> bool:
        return self.skip_attn is not None or self.skip_ffn is not None
