"""Turns the user's options into a drafter and a search, or into the reason why there is none."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from swift_gguf.drafting import draft_model, layer_skip
from swift_gguf.drafting.draft_model import DraftModel
from swift_gguf.drafting.layer_skip import LayerSkip
from swift_gguf.drafting.ngram import NGram
from swift_gguf.drafting.passes import Passes
from swift_gguf.drafting.policy import Threshold
from swift_gguf.drafting.recycling import Recycling
from swift_gguf.drafting.source import Cycle, Lookup
from swift_gguf.drafting.tree import Shape, caterpillar
from swift_gguf.errors import (
    SidecarError,
    SpoiledError,
    SubnetworkError,
    SwiftError,
    UnsupportedModelError,
)
from swift_gguf.learning import Learning, SearchOptions, Store, space_of
from swift_gguf.model import Model, Sublayer
from swift_gguf.planning import Drafts, Planner
from swift_gguf.planning.calibration import Adaptive, Calibration
from swift_gguf.planning.economy import MAX_NODES, PRIORS
from swift_gguf.planning.planner import WIDE
from swift_gguf.search.drivers import IdleSearch, OnTheFly
from swift_gguf.search.optimizer import Search, Searcher
from swift_gguf.search.paper import PaperOptions
from swift_gguf.search.space import Space
from swift_gguf.search.window import Windows
from swift_gguf.subnetwork import SubNetwork, format_layers

if TYPE_CHECKING:
    from swift_gguf.sampling import SpeculativeSampler

SOURCES = (NGram.name, Recycling.name, layer_skip.NAME, draft_model.NAME)

TREES = {
    "chain": Shape(n_nodes=0),
    "caterpillar": Shape(n_nodes=0, branching=caterpillar, only_first_extends=True),
    "best-first": Shape(n_nodes=0, branching=lambda top: 3),
}
"""Shapes of drafts by name; the engine sets the number of nodes."""

MOST_DRAFTED = 64
"""Our kernels (native/cpu), whose results do not depend on the width, take few columns more."""


@dataclass(frozen=True, kw_only=True)
class SpeculationOptions:
    """What the user asked for.

    Raises:
        SwiftError: a source does not exist or lacks its model file, or drafts are too long.
    """

    mode: str = "auto"
    """``off``; ``auto``: every source that the model allows, where drafts save time; or names of
    sources (`SOURCES`), joined by commas, which then always draft."""
    skip_attn: frozenset[int] | None = None
    skip_ffn: frozenset[int] | None = None
    """The user's own sub-network; both None: from the profile and the search."""
    draft_model: Path | None = None
    """A smaller model of the same family, for the source ``draft-model``."""
    search: str = "auto"
    """``auto``; ``paper``: SWIFT's, to compare with; ``off``."""
    paper: PaperOptions = field(default_factory=PaperOptions)
    draft_max: int | None = None
    """At most `MOST_DRAFTED`; None: the planner decides."""
    p_min: float | None = None
    """Stop drafting below this probability; None: where a draft token no longer saves time."""
    tree: str | None = None
    """One of `TREES`; None: the planner decides."""
    fixed: bool = False
    """Draft up to `draft_max` tokens whatever they cost; for comparisons."""
    sidecar: bool = True
    """Draft with the model's sidecar, if it has one; False is for comparisons."""
    sampled: bool = False
    """Sample the draft tokens, for speculative sampling; layer-skip only."""

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
        """Names of the sources that may draft."""
        if self.mode != "auto":
            return tuple(dict.fromkeys(name.strip() for name in self.mode.split(",")))
        speaks_of_it = (self.p_min, self.tree, self.skip_attn, self.skip_ffn)
        if self.sampled or self.search == "paper" or any(x is not None for x in speaks_of_it):
            return (layer_skip.NAME,)
        return tuple(name for name in SOURCES if name != draft_model.NAME or self.draft_model)

    @property
    def is_auto(self) -> bool:
        """Whether the planner may choose plain decoding."""
        return self.mode == "auto" and len(self.sources) > 1

    @property
    def is_by_hand(self) -> bool:
        return self.skip_attn is not None or self.skip_ffn is not None


_WHY_NOT = {
    "absent": "the model has none in this layer",
    "unshared": "this architecture does not support it",
    "useless": "that would save no time",
}

JOINT_MIN = 0.05
"""With a fixed threshold, the path to a tree's less likely tokens must be this probable."""

SEARCHED_LENGTH = 8
"""Draft length for which a sub-network is judged, unless the user sets a limit."""

SEARCH_SHARE, SEARCH_SHARE_AUTO = 0.05, 0.01
"""Share of the generation's time for the search: layer-skip was asked for, or is one of several
sources."""

WINDOW = 16
"""Positions scored between two cycles: a shorter pass costs more per position."""
IDLE_WINDOW = 32
IDLE_HEAD_MS = 40.0
"""Milliseconds for the head, the longest operation: a pass can stop only between operations."""

SAVE_EVERY_S = 60.0

NOT_TIMED = "drafts begin when two plain passes have been timed"

_log = logging.getLogger("swift_gguf")


class Speculation:
    """The drafter of a model, the reason for it, and the search that runs beside it.

    Raises:
        UnsupportedModelError: a source is asked for by name, and the model cannot be rolled back.
        SubnetworkError: a named sub-layer does not exist or cannot be skipped.
        ModelError: the draft model cannot draft for this one.
        SidecarError: the sidecar that was asked for gives NaN or infinite logits.
    """

    def __init__(
        self,
        model: Model,
        options: SpeculationOptions | None = None,
        *,
        store: Store | None = None,
    ) -> None:
        self.options = options or SpeculationOptions()
        self.drafter: Planner | LayerSkip | None = None
        self.learning: Learning | None = None
        self._model = model
        self._subnetwork = SubNetwork(n_layer=model.n_layer)
        self._skipping: Passes | None = None
        self._is_unknown = False
        self._recycling: Recycling | None = None
        self._draft_model: DraftModel | None = None
        self._calibration = Calibration(PRIORS)
        self._windows = Windows(model, n=WINDOW)
        self._idle_windows: Windows | None = None
        self._on_the_fly: OnTheFly | None = None
        self._saved_at = -math.inf
        try:
            self._why = self._set_up(store)
        except SpoiledError as error:  # the sidecar gave NaN or infinite logits when it was timed
            if model.sidecar is None:
                raise
            model.leave_sidecar_aside(SidecarError(str(error)))
            self._why = self._set_up(store)

    @property
    def enabled(self) -> bool:
        """Whether drafts are made; with ``auto``, whether there was one recently."""
        if isinstance(self.drafter, Planner) and self.options.is_auto:
            return self.drafter.active
        return self.drafter is not None

    @property
    def why(self) -> str:
        """Which sources draft, or the reason why none does."""
        if isinstance(self.drafter, Planner) and self.options.is_auto:
            if self.enabled:
                return f"{self._why}: where they pay"
            is_timed = self.learning is not None and self.learning.here.is_known
            return self.drafter.why_plain if is_timed else NOT_TIMED
        if self.learning and self.learning.searcher and self._skipping:
            return f"{self._why}: {self._subnetwork}"
        return self._why

    @property
    def row_share(self) -> float | None:
        """Cost of verifying one draft token, in plain passes; None: nothing is drafted."""
        return self.drafter.row_share if isinstance(self.drafter, Planner) else None

    @property
    def draft_max(self) -> int:
        """For `engine.generate`."""
        return self.options.draft_max or MAX_NODES

    # -- setting up --------------------------------------------------------------------------------

    def _set_up(self, store: Store | None) -> str:
        """Returns which sources draft, or the reason why none does."""
        model, options = self._model, self.options
        if options.mode == "off":
            return "switched off"
        if model.only_chains and options.tree not in (None, "chain"):
            raise SwiftError(
                f"drafts of the shape {options.tree} need flash attention: without it a branch is "
                "rounded differently from plain decoding; use --tree chain, or switch it on"
            )
        if refusal := model.rollback_refusal:
            if options.mode != "auto" or options.is_by_hand:
                raise UnsupportedModelError(f"no speculation: {refusal}; use --speculation off")
            return refusal
        can_skip = layer_skip.NAME in options.sources and self._can_skip()
        others = [name for name in options.sources if name != layer_skip.NAME]
        if not can_skip and not others:
            return "no layer can be skipped: a draft would cost a full pass"
        self.learning = self._learn(can_skip, store)
        what = [*others]
        if can_skip:
            what.append(self._set_up_layer_skip(self.learning))
        if options.sampled:
            self.drafter = self._drawing(self.learning)
        else:
            self.drafter = self._planner(self.learning, others)
        self.drafter.watch(self._observe)
        self._refresh()
        return ", ".join(what)

    def _can_skip(self) -> bool:
        """Fills in a sub-network given by hand."""
        if self.options.is_by_hand:
            self._subnetwork = _by_hand(self._model, self.options)
            return bool(self._subnetwork.skip_attn or self._subnetwork.skip_ffn)
        return self._space() is not None

    def _space(self) -> Space | None:
        return space_of(self._model, with_sidecar=self.options.sidecar)

    def _learn(self, can_skip: bool, store: Store | None) -> Learning:
        options = self.options
        searches = can_skip and not options.is_by_hand
        return Learning(
            self._model,
            self._space() if searches else None,
            store=store,
            with_sidecar=options.sidecar,
            options=SearchOptions(
                paper=options.paper if options.search == "paper" else None,
                draft_max=options.draft_max or SEARCHED_LENGTH,
                p_min=options.p_min,
            ),
        )

    def _set_up_layer_skip(self, learning: Learning) -> str:
        """Returns the origin of the sub-network."""
        self._skipping = Passes(layer_skip.NAME, self._model, self._subnetwork)
        if learning.searcher is None:
            return f"{layer_skip.NAME} as given: {self._subnetwork}"
        if self.options.search != "off":
            self._on_the_fly = self._search(learning, learning.searcher)
        origin = "found by search" if learning.started_from_profile else "a first guess"
        return f"{layer_skip.NAME} ({origin})"

    def _search(self, learning: Learning, searcher: Searcher) -> OnTheFly:
        options = self.options
        paper = options.paper if options.search == "paper" else None
        if paper:
            self._windows = Windows(self._model, n=paper.context_window, steps=1, own_past=True)
        share = SEARCH_SHARE_AUTO if options.is_auto else SEARCH_SHARE
        return OnTheFly(
            searcher,
            self._windows,
            cost_s=lambda: learning.here.verify_ms(WINDOW) / 1e3,
            share=None if paper else share,
            interval=paper.opt_interval if paper else 1,
            on_step=self._refresh,
            meter=learning.meter,
        )

    def _planner(self, learning: Learning, others: list[str]) -> Planner:
        options, lookups = self.options, list[Lookup]()
        if NGram.name in others:
            lookups.append(NGram())
        if Recycling.name in others:
            self._recycling = learning.recycling()
            lookups.append(self._recycling)
        drafts = [Drafts(self._skipping, self._draft_ms)] if self._skipping else []
        if draft_model.NAME in others and options.draft_model:
            self._draft_model = DraftModel(options.draft_model, self._model)
            drafts.append(Drafts(self._draft_model, self._draft_model_ms(self._draft_model.model)))
        is_fixed = options.fixed or options.p_min is not None
        is_wide = not (is_fixed or options.tree or self._model.only_chains)
        return Planner(
            self._model,
            learning.here,
            lookups=lookups,
            drafts=drafts,
            calibration=self._calibration,
            forced=not options.is_auto,
            fixed=self._threshold() if is_fixed else None,
            shape=WIDE if is_wide else TREES[options.tree or "chain"],
            # a source that was asked for by name offers its likeliest token only
            n_offers=None if options.is_auto or options.tree else 1,
        )

    def _drawing(self, learning: Learning) -> LayerSkip:
        """The drafter for speculative sampling, where one source draws the whole tree."""
        if not self._skipping:
            raise SwiftError("--speculative-sampling drafts by layer-skip; leave other sources out")
        is_fixed = self.options.p_min is not None
        here = learning.here
        policy = (
            self._threshold()
            if is_fixed
            else Adaptive(
                self._calibration,
                draft_share=lambda: here.draft_ms(self._subnetwork) / here.verify_ms(1),
                verify_share=lambda: (here.verify_ms(5) / here.verify_ms(1) - 1) / 4,
            )
        )
        shape = TREES[self.options.tree or "chain"]
        drafter = LayerSkip(self._model, self._subnetwork, policy=policy, shape=shape)

        def watch(cycle: Cycle) -> None:
            self._calibration.observe(cycle.tree, cycle.verdict.accepted)
            here.observe(len(cycle.tree) + 1, 1e3 * cycle.verify_s)

        drafter.watch(watch)
        return drafter

    def _threshold(self) -> Threshold:
        is_chain = self.options.tree in (None, "chain")
        return Threshold(self.options.p_min or 0.0, joint_min=1.0 if is_chain else JOINT_MIN)

    # -- while it is used --------------------------------------------------------------------------

    def begin(self, prompt_n: int, *, sampler: SpeculativeSampler | None = None) -> OnTheFly | None:
        """Starts a generation; returns the search to run beside it, for `engine.generate`.

        prompt_n: tokens before the generated text.
        sampler: draws the draft tokens, for speculative sampling.
        """
        if self.learning:
            self.learning.begin()
        searcher = self.learning.searcher if self.learning else None
        if isinstance(searcher, Search) and searcher.done:
            searcher.reopen()  # another kind of text may give better results
        if isinstance(self.drafter, LayerSkip):
            self.drafter.sampler = sampler
        if isinstance(self.drafter, Planner):
            self.drafter.begin()
        self._refresh()
        for windows in filter(None, (self._windows, self._idle_windows)):
            windows.first, windows.text = prompt_n, None
        return self._on_the_fly if self._is_promising else None

    def end(self) -> None:
        """Ends a generation: the idle search keeps to the text that is in the context now."""
        if self._idle_windows:
            self._idle_windows.text = list(self._model.tokens)

    def idle_search(
        self,
        *,
        on_step: Callable[[], None] = lambda: None,
        first: Callable[[], bool] | None = None,
    ) -> IdleSearch | None:
        """Measures the costs of passes and searches on the model's live context, while the model is
        idle.  None: there is nothing to measure or to search.

        The caller uses the model only inside `IdleSearch.paused`, and closes the search before the
        model.

        on_step: called after every step, in the search's thread, while it holds the model.
        first: work that comes before all this, called in the thread; False: there is none.
        """
        learning = self.learning
        searcher = learning.searcher if learning and self._on_the_fly else None
        if learning is None or (searcher is None and learning.is_measured):
            if first is None:
                return None
            return IdleSearch(self._model, None, lambda: None, before=first)
        chunk = max(1, min(IDLE_WINDOW, int(IDLE_HEAD_MS / max(learning.costs.head_ms, 1e-3))))
        self._idle_windows = Windows(self._model, n=IDLE_WINDOW, chunk=chunk)
        self._idle_windows.first = self._windows.first
        self.end()

        def step() -> None:
            self._refresh()
            on_step()

        return IdleSearch(
            self._model,
            searcher,
            self._idle_windows,
            on_step=step,
            before=lambda: (first is not None and first()) or learning.measure_in_idle(),
            meter=learning.meter,
        )

    @property
    def _is_promising(self) -> bool:
        """Whether a search is worth the user's time.  Where layer-skip is one source of several,
        only if it nearly saves time; otherwise `tune` and idle time are enough."""
        if self._skipping and self._skipping.is_broken:
            return False
        known = self.learning.best_known if self.learning and self.learning.searcher else None
        return not self.options.is_auto or (known is not None and known.rate.speedup > 0.9)

    def _observe(self, cycle: Cycle) -> None:
        """Reports the acceptance of its sub-network to the search."""
        searcher = self.learning.searcher if self.learning else None
        if not isinstance(searcher, Search):
            return
        tree = cycle.tree
        is_ours = [  # the search rates the likeliest tokens only
            offer.source == layer_skip.NAME and offer.rank == 0
            for offer in map(tree.offer, range(len(tree)))
        ]
        if any(is_ours):
            searcher.observe(sum(is_ours[node] for node in cycle.verdict.accepted), sum(is_ours))

    def _draft_ms(self) -> float:
        """Cost of a pass of the sub-network; infinite while too little is known about it."""
        assert self.learning is not None
        if self._is_unknown:
            return math.inf
        return self.learning.here.draft_ms(self._subnetwork)

    def _draft_model_ms(self, model: Model) -> Callable[[], float]:
        """Cost of a pass of a draft model: the target's, by bytes.  `Pace` corrects it."""
        assert self.learning is not None
        here, share = self.learning.here, model.n_bytes / max(1, self._model.n_bytes)
        return lambda: share * here.verify_ms(1)

    def _refresh(self) -> None:
        """Switches to the best sub-network that the search knows."""
        learning = self.learning
        if learning is None or learning.searcher is None:
            return
        self._is_unknown = self.options.is_auto and learning.best_known is None
        if learning.best == self._subnetwork:
            return
        self._subnetwork = learning.best
        if self._skipping:
            self._skipping.subnetwork = self._subnetwork
        if isinstance(self.drafter, LayerSkip):
            self.drafter.subnetwork = self._subnetwork
        self._calibration.forget(layer_skip.NAME)
        if known := learning.best_known:
            for outcome in known.outcomes.values():
                self._calibration.recall(layer_skip.NAME, outcome.agrees, outcome.confidence)

    def save(self) -> None:
        """Saves what was learned to the profile."""
        if self.learning:
            self.learning.save(self._recycling)
        self._saved_at = monotonic()

    @property
    def is_save_due(self) -> bool:
        """Whether the last save is more than `SAVE_EVERY_S` ago."""
        return monotonic() - self._saved_at >= SAVE_EVERY_S

    def retire(self) -> None:
        """Saves what was learned and closes; logs a failure to save."""
        try:
            self.save()
        except (SwiftError, OSError) as error:
            _log.warning("what was learned is lost: %s", error)
        finally:
            self.close()

    def close(self) -> None:
        """Frees the draft model, if there is one; may be called twice."""
        if self._draft_model:
            self._draft_model.close()


def _by_hand(model: Model, options: SpeculationOptions) -> SubNetwork:
    subnetwork = SubNetwork(
        n_layer=model.n_layer,
        skip_attn=options.skip_attn or frozenset(),
        skip_ffn=options.skip_ffn or frozenset(),
    )
    attention, ffn = model.sublayers
    _refuse_unskippable("attention", subnetwork.skip_attn, attention)
    _refuse_unskippable("FFN", subnetwork.skip_ffn, ffn)
    return subnetwork


def _refuse_unskippable(kind: str, layers: frozenset[int], sublayers: list[Sublayer]) -> None:
    for status, reason in _WHY_NOT.items():
        if wrong := [layer for layer in sorted(layers) if sublayers[layer].status == status]:
            raise SubnetworkError(f"cannot skip {kind} {format_layers(wrong)}: {reason}")
