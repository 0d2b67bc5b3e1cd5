"""Learns about a model while it is used, and keeps the results in its profile."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from swift_gguf.drafting.recycling import Recycling
from swift_gguf.errors import StoppedError
from swift_gguf.gguf.identity import profile_key
from swift_gguf.interrupts import heard
from swift_gguf.learning.profile import EMBEDDED, Known, Profile, Seen, Store, embedded
from swift_gguf.model import Model
from swift_gguf.planning.cost import WIDTHS, Costs, CostsHere, costs_key, stored_costs
from swift_gguf.planning.measuring import Budget, Measurement, estimated
from swift_gguf.search.drivers import Meter
from swift_gguf.search.optimizer import Knowledge, Search, Searcher
from swift_gguf.search.paper import PaperOptions, PaperSearch
from swift_gguf.search.space import Space
from swift_gguf.subnetwork import SubNetwork

MIN_POSITIONS = 64
"""Results on fewer positions may be luck.  They are kept, but not used yet."""

QUICK_WIDTHS = tuple(width for width in WIDTHS if width <= 8)
LOOK_S = 1.0
"""Time of one look in idle time, after which the search has its turn."""
TRY_S = 0.25
"""Time to try a sidecar before the first answer."""


def space_of(model: Model, *, with_sidecar: bool = True) -> Space | None:
    """The sub-layers of a model that a draft may skip; None if there are none.

    With a sidecar, FFNs are narrowed instead of skipped.
    """
    attn, ffn = (
        [i for i, sublayer in enumerate(kind) if sublayer.status == "ok"]
        for kind in model.sublayers
    )
    sidecar = model.usable_sidecar() if with_sidecar else None
    if sidecar and sidecar.narrow_layers:
        narrow, has_head = sorted(sidecar.narrow_layers), sidecar.n_head > 0
        return Space(model.n_layer, attn, narrow, is_narrow=True, has_head=has_head)
    inner = set(range(1, model.n_layer - 1))
    if not inner & {*attn, *ffn}:
        return None
    return Space(model.n_layer, attn, ffn)


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Options of the search for sub-networks."""

    paper: PaperOptions | None = None
    """SWIFT's own search, to compare with; None: ours."""
    draft_max: int = 8
    p_min: float | None = None
    """The confidence below which a draft stops; None: the search finds the best value."""


class Learning:
    """The profile of a model, the costs of its passes on this machine, and the search.

    Where a model never ran on this machine, costs are estimated from the bytes that passes read,
    and learned from the passes of its answers.  In idle time they are measured, once
    (`measure_in_idle`).  Measured costs are in the profile at once, even if the measurement is
    stopped.

    Raises:
        UnsupportedModelError: the model cannot remove tokens from its cache.
        SpoiledError: a sidecar that was never used on this machine gives NaN or infinite logits.
    """

    def __init__(
        self,
        model: Model,
        space: Space | None,
        *,
        store: Store | None = None,
        options: SearchOptions | None = None,
        with_sidecar: bool = True,
    ) -> None:
        options = options or SearchOptions()
        self.store = store or Store()
        self.meter = Meter()
        self._model = model
        sidecar = model.sidecar.path if model.sidecar and with_sidecar else None
        self._fingerprint = profile_key(model.path, sidecar)
        self._saved = Meter()
        profile = self.store.load(self._fingerprint)
        if profile is None and sidecar is None:
            text = model.metadata(EMBEDDED)
            profile = embedded(text, fingerprint=self._fingerprint)
        if profile is not None and profile.n_layer != model.n_layer:
            profile = None
        self._may_look = True
        self._latest: Costs | None = None
        costs = stored_costs(model, profile.costs) if profile else None
        if sidecar and (costs is None or "sidecar" in costs.untimed):
            self._try_sidecar()
        self.here = CostsHere(model, costs or estimated(model))
        """The costs at the current length of the context.  The search uses them."""
        self._recycled = profile.recycling if profile else ()
        self.searcher: Searcher | None = None
        """None if there is nothing to search."""
        if space is None:
            pass
        elif options.paper:
            self.searcher = PaperSearch(space, options.paper)
        else:
            self.searcher = self._search(space, profile, options)
        self.started_from_profile = bool(profile and profile.known)

    def _search(self, space: Space, profile: Profile | None, options: SearchOptions) -> Search:
        """Our own search, which continues from earlier runs."""
        stored = [known for known in profile.known if known.subnetwork in space] if profile else []
        return Search(
            space,
            self.here,
            # the best of the last run comes first: it was compared on the same windows
            known=[known.subnetwork for known in stored if known.positions >= MIN_POSITIONS],
            seen={
                known.subnetwork: {key: seen.outcome() for key, seen in known.seen.items()}
                for known in stored
            },
            draft_max=options.draft_max,
            p_min=options.p_min,
            seed=profile.evaluations if profile else 0,
        )

    @property
    def costs(self) -> Costs:
        """The measured and learned costs."""
        return self.here.measured

    def measure_costs(self) -> None:
        """Measures the costs of passes, until the times are sure."""
        self.here.update(self._measured(WIDTHS, rounds=3))

    def _try_sidecar(self) -> None:
        """Runs one pass with the sidecar's weights.  In an answer, damaged ones would end it."""
        model, sidecar = self._model, self._model.sidecar
        assert sidecar is not None
        narrow = SubNetwork(
            n_layer=model.n_layer,
            narrow_ffn=sidecar.narrow_layers,
            draft_head=sidecar.n_head > 0,
        )
        n_past = model.n_past
        try:
            with Budget(seconds=TRY_S).stopping(model):
                model.decode(range(min(4, model.room, model.n_vocab)), subnetwork=narrow)
                model.top(0)
        finally:
            if n_past:
                model.rollback(n_past)
            else:
                model.clear()

    def begin(self) -> None:
        """Notes that an answer begins.  Costs may be measured again after it."""
        self._may_look = True

    @property
    def is_measured(self) -> bool:
        """Whether all costs were measured on this machine.  That is done once."""
        return self.costs.is_sure

    def measure_in_idle(self) -> bool:
        """Measures missing and uncertain costs, while nobody waits for the model.  False: there is
        nothing to do.

        Each call measures for `LOOK_S` at most and leaves the context as it is, but for the logits
        of the last decode.  The model's stop flag ends it within one operation of a pass.  On a
        busy machine there is one call for each answer, because the machine may be busy for long.

        Raises:
            StoppedError: the stop flag is up; what was timed is kept.
        """
        if self.is_measured or not self._may_look or self._model.room < max(QUICK_WIDTHS):
            return False
        known = self.costs
        try:
            costs = self._measured(QUICK_WIDTHS, rounds=2, known=known, seconds=LOOK_S)
            self._may_look = costs.n_timed > known.n_timed and not costs.is_busy
        finally:  # the measurement may be stopped
            if self._latest is not None:
                self.here.update(self._latest)
        return True

    def _measured(
        self,
        widths: Sequence[int],
        *,
        rounds: int,
        known: Costs | None = None,
        seconds: float = math.inf,
    ) -> Costs:
        """Measures costs and keeps them.  An empty context is filled with tokens meanwhile.

        known: the costs so far.  They stay if they are more certain.
        """
        self._latest = None
        model, budget = self._model, Budget(seconds=seconds)
        measurement = Measurement(model, widths=widths, known=known)
        is_empty, is_told = model.n_past == 0, threading.Event()

        def stop() -> None:
            is_told.set()
            model.stop.raise_()

        try:
            with heard(stop):
                if is_empty:
                    n_tokens = max(1, min(max(widths), model.n_ctx // 2))
                    with budget.stopping(model):
                        model.decode([7919 * i % model.n_vocab for i in range(n_tokens)])
                if model.n_past:
                    measurement.run(budget, rounds=rounds)
            return self._kept(measurement, known)
        except (KeyboardInterrupt, SystemExit, StoppedError):
            self._kept(measurement, known)
            raise
        finally:
            if is_told.is_set():
                model.stop.lower()
            if is_empty:
                model.clear()

    def _kept(self, measurement: Measurement, known: Costs | None) -> Costs:
        """The more certain costs of both.  New costs go into the profile."""
        costs = measurement.costs()
        if known is not None and (costs.trust < known.trust or not measurement.has_timed):
            return known
        if measurement.has_timed:
            self._latest = costs
            self.store.add(replace(self._nothing_new(), costs=self._by_key(costs)))
        return costs

    @property
    def best(self) -> SubNetwork:
        """The sub-network to draft with."""
        assert self.searcher is not None
        return self.searcher.best

    @property
    def best_known(self) -> Knowledge | None:
        """The results of the best sub-network; None while there are too few positions."""
        if not isinstance(self.searcher, Search):
            return None
        best = next(iter(self.searcher.knowledge(1)), None)
        is_enough = best and best.subnetwork == self.best and best.rate.positions >= MIN_POSITIONS
        return best if is_enough else None

    def recycling(self) -> Recycling:
        """The table of successors from earlier runs."""
        try:
            return Recycling.from_rows(list(self._recycled), n_vocab=self._model.n_vocab)
        except ValueError:  # the table is from another vocabulary
            return Recycling()

    def save(self, recycling: Recycling | None = None) -> None:
        """Adds to the profile what was learned since the last call.

        The search must not run at the same time; see `IdleSearch.paused`.
        """
        found = self.searcher.knowledge() if isinstance(self.searcher, Search) else []
        self.store.add(
            replace(
                self._nothing_new(),
                known=tuple(
                    Known(
                        subnetwork=item.subnetwork,
                        seen={str(key): Seen.of(value) for key, value in item.outcomes.items()},
                    )
                    for item in found
                ),
                costs=self._by_key(self.here.refreshed()),
                recycling=tuple(recycling.to_rows()) if recycling is not None else (),
                search_s=self.meter.seconds - self._saved.seconds,
                evaluations=self.meter.steps - self._saved.steps,
            )
        )
        self._saved = Meter(self.meter.seconds, self.meter.steps)

    def _nothing_new(self) -> Profile:
        """An empty profile of this model."""
        return Profile(
            fingerprint=self._fingerprint,
            model=self._model.metadata("general.name") or self._model.path.stem,
            n_layer=self._model.n_layer,
        )

    def _by_key(self, costs: Costs) -> dict[str, dict[str, Any]]:
        if costs.is_estimate:
            return {}
        return {costs_key(self._model, costs): costs.as_dict()}
