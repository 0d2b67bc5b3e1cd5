"""Times real forward passes on this machine."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from swift_gguf.errors import ContextFullError, StoppedError, UnsupportedModelError
from swift_gguf.model import Model, Sublayer
from swift_gguf.planning.cost import WIDTHS, Costs
from swift_gguf.planning.waiting import waited_s
from swift_gguf.subnetwork import SubNetwork

ROWS_WIDTH = 8  # width of the pass that shows what rows of logits cost
STABLE = 0.015
"""Times are sure when the fastest and the next one differ by at most this share."""
BUSY = 0.15
"""The machine is busy if threads waited for a CPU for more than this share of the fastest passes'
time."""
GUESSED_BYTES_PER_MS = 1e7
"""Memory speed of an ordinary machine; used only until a pass was timed."""
MORE = 0.5
"""What each token after the first adds to a pass, in passes, until that was timed.  Most machines
need less (.1 to .3), and a few need more: with this, only likely tokens are drafted at first."""


@dataclass(frozen=True)
class _Case:
    width: int = 1
    subnetwork: SubNetwork | None = None
    rows: int | None = None
    """Rows with logits; None: all rows."""
    is_switch: bool = False
    """One token, right after a pass of another kind; others run after a pass of their own kind."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Wall-clock time for a measurement, kept to within one operation of a pass.

    clock, waited: seconds; see `waiting.waited_s`.
    """

    seconds: float = math.inf
    clock: Callable[[], float] = perf_counter
    waited: Callable[[], float] = waited_s
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_began", self.clock())

    @property
    def left_s(self) -> float:
        return self.seconds - (self.clock() - self._began)

    @contextmanager
    def stopping(self, model: Model) -> Iterator[None]:
        """When the time is over, stops the pass that is running and leaves the block."""
        if self.seconds == math.inf:
            yield
            return
        is_over = False

        def stop() -> None:
            nonlocal is_over
            is_over = True
            model.stop.raise_()

        timer = threading.Timer(max(0.0, self.left_s), stop)
        timer.daemon = True
        timer.start()
        try:
            yield
        except StoppedError:
            if self.left_s > 0 and not is_over:  # someone else asked to stop
                raise
        finally:
            timer.cancel()
            timer.join()
            if is_over:
                model.stop.lower()


def measure(
    model: Model,
    *,
    widths: Sequence[int] = WIDTHS,
    rounds: int = 3,
    budget: Budget | None = None,
) -> Costs:
    """Times forward passes at the end of the current context and rolls each of them back.

    See `Measurement`, which also lists the errors.
    """
    measurement = Measurement(model, widths=widths)
    measurement.run(budget or Budget(), rounds=rounds)
    return measurement.costs()


def estimated(model: Model) -> Costs:
    """Costs from the bytes that passes read.  Nothing is timed.

    Raises:
        UnsupportedModelError: the model cannot take tokens back.
    """
    return Measurement(model).costs()


class Measurement:
    """Forward passes at the end of the current context, timed and rolled back.

    The context and `model.tokens` stay as they are, even after an error.  The logits of the last
    decode are lost, and so is a tree that is not committed yet.

    widths: widths that do not fit the context or a batch are left out; 1 is always measured.
    known: an earlier provisional measurement to continue.

    Raises:
        UnsupportedModelError: the model cannot take tokens back.
        ValueError: there are widths below 1.
    """

    def __init__(
        self, model: Model, *, widths: Sequence[int] = WIDTHS, known: Costs | None = None
    ) -> None:
        if refusal := model.rollback_refusal:
            raise UnsupportedModelError(
                f"cannot measure what passes cost: {refusal}; use --speculation off"
            )
        if min(widths, default=1) < 1:
            raise ValueError("a pass of no tokens")
        room = max(1, min(model.room, model.n_batch))
        self._model = model
        self._known = known.at(model.n_past) if known and not known.is_busy else None
        self._attention, self._ffn = attention, ffn = model.sublayers
        self._wide = [_Case(width) for width in sorted({1, *widths}) if width <= room]
        self._full = self._wide[0]
        self._all_rows = max(
            (case for case in self._wide if case.width <= ROWS_WIDTH), key=lambda case: case.width
        )
        # Two rows: a single one is computed by other kernels.
        self._few_rows = _Case(self._all_rows.width, rows=min(2, self._all_rows.width))
        self._switch = _Case(is_switch=True)
        self._without = [
            _without(model, attention=attention, ffn=ffn),
            _without(model, attention=attention),
            _without(model, ffn=ffn),
        ]
        self._narrow = [_narrow(model, head=head) for head in (False, True)]
        self._times: dict[_Case, list[_Time]] = {case: [] for case in self._by_worth()}
        self._is_settled = False

    @property
    def has_timed(self) -> bool:
        """Whether any pass was timed."""
        return any(self._times.values())

    def _by_worth(self) -> list[_Case]:
        """All cases, the most useful first, as there may not be time for all.

        Cases that an earlier measurement timed come last.
        """
        small = [case for case in self._wide if case.width <= 2]
        widest, *others = reversed(self._wide)
        cases = dict.fromkeys([*small, widest, *self._narrow, self._without[0], *others])
        cases |= dict.fromkeys([*self._without, self._switch, self._few_rows])
        return sorted(cases, key=lambda case: self._known_s(case) is not None)

    def run(self, budget: Budget, *, rounds: int) -> None:
        """Times the cases in rounds until the times are sure or the budget is spent.

        Every round has all cases, so a slow spell affects all of them.  Disturbances only add
        time, on a busy machine in two rounds of three.  So the fastest time counts; a median would
        carry the disturbance into many later runs.

        rounds: the minimum; on a noisy machine up to three times as many.

        May be interrupted; times measured until then are kept.

        Raises:
            ContextFullError: not even one token fits.
            ValueError: the context is empty, or there are no rounds.
        """
        if rounds < 1 or self._model.n_past < 1:
            raise ValueError("measure with tokens in the context, in at least one round")
        if self._model.room < 1:
            raise ContextFullError(
                f"no room to measure in a full context of {self._model.n_ctx} tokens; "
                "use a larger --ctx-size or a shorter prompt"
            )
        with budget.stopping(self._model):
            for number in range(3 * rounds):
                if number >= rounds and self._is_sure():
                    break
                for case in self._times:
                    if budget.left_s <= 0:
                        return
                    self._time(case, budget)
            self._is_settled = True

    def _is_sure(self) -> bool:
        """Whether the fastest times are right within `STABLE`.

        The fastest of a few times is off by about its gap to the next one.  Three cases of four
        need a small gap: one case may have it by luck, and waiting for all four would mostly run
        into the limit.
        """
        gaps = []
        for times in self._times.values():
            fastest, *others = sorted(time.seconds for time in times)
            gaps.append(others[0] / fastest - 1 if others else math.inf)
        return sorted(gaps)[3 * len(gaps) // 4] <= STABLE

    def _time(self, case: _Case, budget: Budget) -> None:
        model = self._model
        if case.width == 1 and not case.is_switch:
            # Plain decoding and drafts reuse the last graph.  A verification follows a draft and
            # has to switch graphs.
            _run(model, case)
        waited, start = budget.waited(), budget.clock()
        _run(model, case)
        seconds = budget.clock() - start
        self._times[case].append(_Time(seconds, budget.waited() - waited))

    def _known_s(self, case: _Case) -> float | None:
        """The time from the earlier measurement, if it has one."""
        known = self._known
        if known is None or self._part(case) in known.untimed:
            return None
        passes = dict(known.pass_ms)
        if case.width not in passes:
            return None
        ms = known.draft_ms(case.subnetwork) if case.subnetwork else passes[case.width]
        ms += known.switch_ms * case.is_switch
        ms -= known.row_ms * (case.width - (case.rows or case.width))
        return ms / 1e3

    def _part(self, case: _Case) -> str:
        if case in self._narrow and case != self._full:
            return "sidecar"
        if case in self._without and case != self._full:
            return "sub-layers"
        if case == self._switch:
            return "switch"
        return "rows" if case.rows and case not in self._wide else "passes"

    # -- what it comes to --------------------------------------------------------------------------

    def costs(self) -> Costs:
        """Complete costs from what was timed so far; the rest is estimated."""
        model, attention, ffn = self._model, self._attention, self._ffn
        found = self._fastest()
        ms = {case: 1e3 * seconds for case, seconds in found.items()}
        missing = [case for case in self._times if case not in found]
        # widths without a time are interpolated from the others
        untimed = {self._part(case) for case in missing if case not in self._wide[1:]}
        full_bytes = _pass_bytes(model, None)
        full_ms = ms.setdefault(self._full, full_bytes / GUESSED_BYTES_PER_MS)
        for case in (*self._without, *self._narrow):
            share = _pass_bytes(model, case.subnetwork) / full_bytes if full_bytes else 1.0
            ms.setdefault(case, full_ms * share)
        both, no_attention, no_ffn = (ms[case] for case in self._without)
        narrow, narrow_head = (ms[case] for case in self._narrow)
        saved = max(0.0, full_ms - both)
        # The mean over both orders of leaving out the two kinds (a Shapley value): they add up to
        # what leaving out both saves.  Noise may make either one negative.
        alone = (full_ms - no_attention + no_ffn - both) / 2
        attention_ms = min(max(0.0, alone), saved)
        # The head gets its share of the rest by bytes.  A pass without logits cannot be timed (a
        # GPU would still be running), and the rest includes sub-layers that cannot be skipped.
        rest = model.pass_cost(self._without[0].subnetwork)
        rest_bytes = rest.weight_bytes + rest.kv_bytes
        attention_per_layer = _spread(attention_ms, attention, model)
        more_rows = self._all_rows.width - 2
        has_rows = more_rows > 0 and self._few_rows in found
        rows_ms = ms[self._all_rows] - ms[self._few_rows] if has_rows else 0.0
        return Costs(
            pass_ms=tuple((case.width, ms[case]) for case in self._wide if case in ms),
            attention_ms=attention_per_layer,
            ffn_ms=_spread(saved - attention_ms, ffn, model),
            kv_ms=tuple(
                layer_ms * _kv_bytes_per_token(sublayer, model) / (_bytes(sublayer, model) or 1.0)
                for layer_ms, sublayer in zip(attention_per_layer, attention, strict=True)
            ),
            head_ms=(full_ms - saved) * rest.head_bytes / rest_bytes if rest_bytes else 0.0,
            n_kv=model.n_past,
            more_ms=full_ms * _more(model, full_bytes),
            row_ms=max(0.0, rows_ms) / max(1, more_rows),
            switch_ms=max(0.0, ms.get(self._switch, full_ms) - full_ms),
            narrow_ms=_spread_narrow(max(0.0, full_ms - narrow), ffn, model),
            draft_head_ms=max(0.0, narrow - narrow_head),
            untimed=tuple(sorted(untimed)),
            # a second quick measurement of the rest is enough: live timings correct the errors
            is_provisional=bool(missing) or not (self._is_settled or self._known),
            is_busy=self._is_busy(),
        )

    def _fastest(self) -> dict[_Case, float]:
        """Seconds of each case that was timed now or earlier."""
        seconds = {}
        for case, times in self._times.items():
            known = self._known_s(case)
            all_s = [*(time.seconds for time in times), *([] if known is None else [known])]
            if all_s:
                seconds[case] = min(all_s)
        return seconds

    def _is_busy(self) -> bool:
        """Whether other programs used the CPUs even during the fastest passes."""
        fastest = [
            min(times, key=lambda time: time.seconds) for times in self._times.values() if times
        ]
        waited = math.fsum(time.waited_s for time in fastest)
        return waited > BUSY * math.fsum(time.seconds for time in fastest)


@dataclass(frozen=True)
class _Time:
    seconds: float
    waited_s: float


def _narrow(model: Model, *, head: bool) -> _Case:
    """A one-token pass with the sidecar's narrow FFNs; without a sidecar, the full model."""
    if model.sidecar is None:
        return _Case()
    return _Case(
        subnetwork=SubNetwork(
            n_layer=model.n_layer,
            narrow_ffn=model.sidecar.narrow_layers,
            draft_head=head and model.sidecar.n_head > 0,
        )
    )


def _spread_narrow(total_ms: float, ffn: Sequence[Sublayer], model: Model) -> tuple[float, ...]:
    """Like `_spread`, over the FFNs in the sidecar."""
    if model.sidecar is None:
        return ()
    n_bytes = [
        float(sublayer.weight_bytes) if layer in model.sidecar.narrow_layers else 0.0
        for layer, sublayer in enumerate(ffn)
    ]
    all_bytes = sum(n_bytes) or 1.0
    return tuple(total_ms * part / all_bytes for part in n_bytes)


def _without(
    model: Model, *, attention: Sequence[Sublayer] = (), ffn: Sequence[Sublayer] = ()
) -> _Case:
    """A one-token pass without the given sub-layers, as far as they can be skipped."""
    skip_attn, skip_ffn = (
        frozenset(i for i, sublayer in enumerate(kind) if sublayer.status == "ok")
        for kind in (attention, ffn)
    )
    if not skip_attn and not skip_ffn:
        return _Case()
    return _Case(
        subnetwork=SubNetwork(n_layer=model.n_layer, skip_attn=skip_attn, skip_ffn=skip_ffn)
    )


def _run(model: Model, case: _Case) -> None:
    n_past = model.n_past
    # A mixture of experts reads more weights for different tokens: use tokens of the text.
    tokens = (model.tokens[-case.width :] * case.width)[-case.width :]
    try:
        model.decode(tokens, n_outputs=case.rows or case.width, subnetwork=case.subnetwork)
        model.top(0)  # waits for the GPU, which may still be running when decode returns
    finally:
        model.rollback(n_past)


def _spread(total_ms: float, sublayers: Sequence[Sublayer], model: Model) -> tuple[float, ...]:
    """[n_layer]: the time of one kind of sub-layer, divided by the bytes that each reads.

    Timing each one would take long, and the differences would be smaller than the noise.
    """
    n_bytes = [
        _bytes(sublayer, model) if sublayer.status == "ok" else 0.0 for sublayer in sublayers
    ]
    all_bytes = sum(n_bytes) or 1.0
    return tuple(total_ms * part / all_bytes for part in n_bytes)


def _pass_bytes(model: Model, subnetwork: SubNetwork | None, *, n_tokens: int = 1) -> float:
    """Bytes that a pass of `n_tokens` reads."""
    cost = model.pass_cost(subnetwork, n_tokens=n_tokens)
    return float(cost.weight_bytes + cost.kv_bytes)


def _more(model: Model, full_bytes: float) -> float:
    """What a second token is thought to add to a pass, in passes.  A mixture of experts reads other
    experts for it."""
    more_bytes = _pass_bytes(model, None, n_tokens=2) - full_bytes
    return min(1.0, MORE + max(0.0, more_bytes / full_bytes if full_bytes else 0.0))


def _kv_bytes_per_token(sublayer: Sublayer, model: Model) -> float:
    return sublayer.kv_bytes / model.n_ctx


def _bytes(sublayer: Sublayer, model: Model) -> float:
    """Bytes of a sub-layer that a one-token pass reads at the current context length."""
    return sublayer.weight_bytes + _kv_bytes_per_token(sublayer, model) * model.n_past
