"""From what the user asked for to a drafter and a search, or to the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from swift_gguf.drafting.layer_skip import LayerSkip
from swift_gguf.drafting.policy import Adaptive, Calibration, Threshold
from swift_gguf.drafting.tree import Shape, Tree, caterpillar
from swift_gguf.errors import SubnetworkError, UnsupportedModelError
from swift_gguf.learning import Learning, SearchOptions, space_of
from swift_gguf.model import Model, Sublayer
from swift_gguf.profile import Store
from swift_gguf.search.drivers import IdleSearch, OnTheFly
from swift_gguf.search.optimizer import Search
from swift_gguf.search.paper import PaperOptions
from swift_gguf.search.space import Space
from swift_gguf.search.window import Windows
from swift_gguf.subnetwork import SubNetwork, format_layers

if TYPE_CHECKING:
    from swift_gguf.sampling import SpeculativeSampler

_WHY_NOT = {
    "absent": "the model has none there",
    "unshared": "this architecture builds it in its own way",
    "useless": "that would save nothing",
}

TREES = {
    "chain": Shape(n_nodes=0),
    "caterpillar": Shape(n_nodes=0, branching=caterpillar, only_first_extends=True),
    "best-first": Shape(n_nodes=0, branching=lambda top: 4),
}
"""Shapes of drafts by name; how many nodes they get is the engine's to say."""

JOINT_MIN = 0.05
"""With a fixed threshold, a tree's tokens beside the likeliest one must be this likely."""

WINDOW = 16
"""Positions scored between two cycles: the shortest pass that is cheap by the position."""
IDLE_WINDOW = 32
IDLE_HEAD_MS = 40.0
"""A pass stops between two operations; the head is the longest, and must not take longer."""


@dataclass(frozen=True, kw_only=True)
class SpeculationOptions:
    """What the user asked for."""

    mode: str = "auto"
    """``off``; ``layer-skip``; ``auto``: layer-skip where the model allows it, and while what was
    scored promises to be faster than plain decoding."""
    skip_attn: frozenset[int] | None = None
    skip_ffn: frozenset[int] | None = None
    """A sub-network of the user's own; both None: the profile's, and what the search finds."""
    search: str = "auto"
    """``auto``; ``paper``: SWIFT's, to compare with; ``off``."""
    paper: PaperOptions = field(default_factory=PaperOptions)
    draft_max: int = 8
    p_min: float | None = None
    """Stop drafting below this probability; None: where a token costs more than it promises."""
    tree: str = "chain"
    """One of `TREES`."""

    @property
    def is_by_hand(self) -> bool:
        return self.skip_attn is not None or self.skip_ffn is not None


class Speculation:
    """What drafts for a model, why, and the search that goes on beside it.

    Raises:
        UnsupportedModelError: layer-skip is asked for by name, and the model cannot be rolled back.
        SubnetworkError: a named sub-layer does not exist or cannot be skipped.
    """

    def __init__(
        self,
        model: Model,
        options: SpeculationOptions | None = None,
        *,
        store: Store | None = None,
    ) -> None:
        self.options = options or SpeculationOptions()
        self.drafter: LayerSkip | None = None
        self.learning: Learning | None = None
        self._model = model
        self._calibration = Calibration()
        self._windows = Windows(model, n=WINDOW)
        self._idle_windows: Windows | None = None
        self._on_the_fly: OnTheFly | None = None
        self._why = self._set_up(store)

    @property
    def enabled(self) -> bool:
        """Are drafts made just now?"""
        return self.drafter is not None and not self.drafter.resting

    @property
    def why(self) -> str:
        """The reason for what drafts, or for why nothing does."""
        if self.drafter is None:
            return self._why
        if not self.drafter.resting:
            return f"{self._why}: {self.drafter.subnetwork}"
        known = self.learning.best_known if self.learning else None
        if known is None:
            wait = "" if self._on_the_fly is None else ", until the search knows more"
            return f"what drafts would bring is not known yet (`swift-gguf tune`){wait}"
        return f"plain decoding is faster here: drafts would give {known.rate.speedup:.2f}x"

    def _set_up(self, store: Store | None) -> str:
        """Returns where the sub-network comes from, or why nothing drafts."""
        model, options = self._model, self.options
        if options.mode == "off":
            return "switched off"
        if refusal := model.rollback_refusal:
            if options.mode == "layer-skip" or options.is_by_hand:
                raise UnsupportedModelError(f"no speculation: {refusal}; use --speculation off")
            return refusal
        space = space_of(model)
        if space is None:
            return "nothing to skip: a draft would cost a full pass"
        why, subnetwork = "as given", SubNetwork(n_layer=model.n_layer)
        if options.is_by_hand:
            subnetwork = _by_hand(model, options)
            if not (subnetwork.skip_attn or subnetwork.skip_ffn):
                return "nothing to skip: a draft would cost a full pass"
        if not options.is_by_hand or options.p_min is None:
            self.learning = self._learn(space, store)
        if self.learning and not options.is_by_hand:
            why = "found by search" if self.learning.started_from_profile else "a first guess"
            self._start_search(self.learning)
        self.drafter = LayerSkip(model, subnetwork, shape=TREES[options.tree])
        self.drafter.watch(self._observe)
        self._refresh()
        return why

    def _learn(self, space: Space, store: Store | None) -> Learning:
        options = self.options
        return Learning(
            self._model,
            space,
            store=store,
            options=SearchOptions(
                paper=options.paper if options.search == "paper" else None,
                draft_max=options.draft_max,
                p_min=options.p_min,
            ),
        )

    def _start_search(self, learning: Learning) -> None:
        paper = self.options.paper if self.options.search == "paper" else None
        if self.options.search == "off":
            return
        if paper:
            self._windows = Windows(self._model, n=paper.context_window, steps=1, own_past=True)
        self._on_the_fly = OnTheFly(
            learning.searcher,
            self._windows,
            cost_s=lambda: learning.here.verify_ms(WINDOW) / 1e3,
            share=None if paper else 0.05,
            interval=paper.opt_interval if paper else 1,
            on_step=self._refresh,
            meter=learning.meter,
        )

    def begin(self, prompt_n: int, *, sampler: SpeculativeSampler | None = None) -> OnTheFly | None:
        """For every generation: the search to run beside it, for `engine.generate`.

        prompt_n: where the generated text will begin.
        sampler: draws the drafts, too, if given; for speculative sampling.
        """
        searcher = self.learning.searcher if self.learning else None
        if isinstance(searcher, Search) and searcher.done:
            searcher.reopen()  # of another kind of text there may be more to learn
        if self.drafter:
            self.drafter.sampler = sampler
            self._refresh()
        for windows in filter(None, (self._windows, self._idle_windows)):
            windows.first = prompt_n
        return self._on_the_fly

    def idle_search(self) -> IdleSearch | None:
        """A search on the model's live context for the time in which nobody uses the model.

        The caller uses the model inside `IdleSearch.paused` only, and closes it before the model.
        """
        if not self._on_the_fly or self.learning is None:
            return None
        chunk = max(1, min(IDLE_WINDOW, int(IDLE_HEAD_MS / max(self.learning.costs.head_ms, 1e-3))))
        self._idle_windows = Windows(self._model, n=IDLE_WINDOW, chunk=chunk)
        self._idle_windows.first = self._windows.first
        return IdleSearch(
            self._model,
            self.learning.searcher,
            self._idle_windows,
            on_step=self._refresh,
            meter=self.learning.meter,
        )

    def _observe(self, tree: Tree, accepted: Sequence[int]) -> None:
        self._calibration.observe(tree, accepted)
        self._price()
        if self.learning and isinstance(self.learning.searcher, Search):
            self.learning.searcher.observe(len(accepted), len(tree))

    def _refresh(self) -> None:
        """Drafts with what the search holds best, if that pays."""
        if self.drafter is None:
            return
        options = self.options
        if self.learning and not options.is_by_hand:
            self.drafter.subnetwork = self.learning.best
            known = self.learning.best_known
            may_rest = options.mode == "auto" and options.search != "paper"  # SWIFT always drafts
            self.drafter.resting = may_rest and (known is None or known.rate.speedup < 1)
        self._price()

    def _price(self) -> None:
        """Sets when drafts stop, at the costs of the present context."""
        if self.drafter is None:
            return
        options = self.options
        if options.p_min is not None:
            joint_min = 1.0 if options.tree == "chain" else JOINT_MIN
            self.drafter.policy = Threshold(options.p_min, joint_min=joint_min)
        elif self.learning:
            costs = self.learning.here
            plain = costs.verify_ms(1)
            self.drafter.policy = Adaptive(
                self._calibration,
                draft_share=costs.draft_ms(self.drafter.subnetwork) / plain,
                verify_share=(costs.verify_ms(5) - plain) / 4 / plain,
            )

    def save(self) -> None:
        """Keeps what was learned."""
        if self.learning:
            self.learning.save()


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
