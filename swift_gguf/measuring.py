"""Times real passes, to say what they cost on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from swift_gguf.cost import WIDTHS, Costs
from swift_gguf.errors import ContextFullError, UnsupportedModelError
from swift_gguf.model import Model
from swift_gguf.open_model import Sublayer
from swift_gguf.subnetwork import SubNetwork

ROWS_WIDTH = 8  # of the pass that tells what rows of logits cost
STABLE = 0.03  # two times that differ by no more confirm each other


@dataclass(frozen=True)
class _Case:
    width: int = 1
    subnetwork: SubNetwork | None = None
    rows: int | None = None
    """With logits; None: all of them."""
    is_switch: bool = False
    """One token, after whatever ran before; else one-token passes follow their like."""


def measure(
    model: Model,
    *,
    widths: Sequence[int] = WIDTHS,
    rounds: int = 3,
    clock: Callable[[], float] = perf_counter,
) -> Costs:
    """Times real passes at the end of the present context and takes each of them back.

    The context and `model.tokens` stay as they are, whatever is raised; the logits of the last
    decode are lost, and a tree that is not kept yet.

    widths: those that do not fit the context or a batch are left out; 1 is always measured.
    rounds: at least; on a noisy machine up to three times as many.
    clock: seconds.

    Raises:
        ContextFullError: not even one token fits.
        UnsupportedModelError: the model cannot take tokens back.
        ValueError: the context is empty; there are no rounds, or widths below 1.
    """
    if refusal := model.rollback_refusal:
        raise UnsupportedModelError(
            f"cannot measure what passes cost: {refusal}; use --speculation off"
        )
    if model.n_past < 1 or rounds < 1 or min(widths, default=1) < 1:
        raise ValueError("measure with tokens in the context, in at least one round, from width 1")
    room = min(model.room, model.n_batch)
    if room < 1:
        raise ContextFullError(
            f"no room to measure in a full context of {model.n_ctx} tokens; "
            "use a larger --ctx-size or a shorter prompt"
        )
    attention, ffn = model.sublayers
    without_attn = _without(model, attention=attention)
    without_ffn = _without(model, ffn=ffn)
    without_both = _without(model, attention=attention, ffn=ffn)
    full = _Case()
    wide = [_Case(width) for width in sorted({1, *widths}) if width <= room]
    all_rows = max((case for case in wide if case.width <= ROWS_WIDTH), key=lambda case: case.width)
    # Two rows: a single one is computed by other kernels.
    few_rows = _Case(all_rows.width, rows=min(2, all_rows.width))
    more_rows = all_rows.width - 2
    switch = _Case(is_switch=True)
    narrow, narrow_head = _narrow(model, head=False), _narrow(model, head=True)
    without = [without_attn, without_ffn, without_both, narrow, narrow_head]
    cases = list(dict.fromkeys([*wide, few_rows, switch, *without]))
    ms = _times(model, cases, rounds, clock)

    saved = max(0.0, ms[full] - ms[without_both])
    # The mean over both orders of leaving the kinds out (a Shapley value), so that they add up to
    # what leaving out both saves.  Noise may make either negative.
    alone = (ms[full] - ms[without_attn] + ms[without_ffn] - ms[without_both]) / 2
    attention_ms = min(max(0.0, alone), saved)
    # Of the rest, the head has its share in the bytes: to time a pass without logits would leave a
    # GPU running, and where sub-layers cannot be skipped they are in the rest, too.
    rest = model.pass_cost(without_both.subnetwork)
    rest_bytes = rest.weight_bytes + rest.kv_bytes
    attention_per_layer = _spread(attention_ms, attention, model)
    return Costs(
        pass_ms=tuple((case.width, ms[case]) for case in wide),
        attention_ms=attention_per_layer,
        ffn_ms=_spread(saved - attention_ms, ffn, model),
        kv_ms=tuple(
            layer_ms * _kv_bytes_per_token(sublayer, model) / (_bytes(sublayer, model) or 1.0)
            for layer_ms, sublayer in zip(attention_per_layer, attention, strict=True)
        ),
        head_ms=(ms[full] - saved) * rest.head_bytes / rest_bytes if rest_bytes else 0.0,
        n_kv=model.n_past,
        row_ms=max(0.0, ms[all_rows] - ms[few_rows]) / more_rows if more_rows > 0 else 0.0,
        switch_ms=max(0.0, ms[switch] - ms[full]),
        narrow_ms=_spread_narrow(max(0.0, ms[full] - ms[narrow]), ffn, model),
        draft_head_ms=max(0.0, ms[narrow] - ms[narrow_head]),
    )


def _narrow(model: Model, *, head: bool) -> _Case:
    """A one-token pass with every FFN as narrow as the sidecar has it; the whole model without."""
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
    """As `_spread`, over the FFNs that the sidecar has."""
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
    """A one-token pass without those of the sub-layers that can be skipped."""
    skip_attn, skip_ffn = (
        frozenset(i for i, sublayer in enumerate(kind) if sublayer.status == "ok")
        for kind in (attention, ffn)
    )
    if not skip_attn and not skip_ffn:
        return _Case()
    return _Case(
        subnetwork=SubNetwork(n_layer=model.n_layer, skip_attn=skip_attn, skip_ffn=skip_ffn)
    )


def _times(
    model: Model, cases: Sequence[_Case], rounds: int, clock: Callable[[], float]
) -> dict[_Case, float]:
    """Milliseconds of each case: the fastest of the rounds, as soon as every one is confirmed.

    All cases are in every round, so that a slow spell hits all alike.  Disturbances only ever add,
    on a busy machine to two rounds of three: a median would remember them for many runs to come.
    """
    seconds: dict[_Case, list[float]] = {case: [] for case in cases}
    for number in range(3 * rounds):
        if number >= rounds and all(map(_is_confirmed, seconds.values())):
            break
        for case, times in seconds.items():
            if case.width == 1 and not case.is_switch:
                # Plain decoding and drafts repeat one graph; a verification follows a draft and
                # pays for the change.
                _run(model, case)
            start = clock()
            _run(model, case)
            times.append(clock() - start)
    return {case: 1e3 * min(times) for case, times in seconds.items()}


def _is_confirmed(times: Sequence[float]) -> bool:
    """Was the fastest time met twice?

    A quiet machine needs no further rounds for that.  Where 10 % of noise are added, to stop when
    the sum of all cases improves by less than 2 % leaves one width in six more than 5 % off.
    """
    fastest, *others = sorted(times)
    return bool(others) and others[0] <= (1 + STABLE) * fastest


def _run(model: Model, case: _Case) -> None:
    n_past = model.n_past
    # A mixture of experts reads more for different tokens: take those of the text itself.
    tokens = (model.tokens[-case.width :] * case.width)[-case.width :]
    try:
        model.decode(tokens, n_outputs=case.rows or case.width, subnetwork=case.subnetwork)
        model.top(0)  # waits for a GPU, which is still at work when decode returns
    finally:
        model.rollback(n_past)


def _spread(total_ms: float, sublayers: Sequence[Sublayer], model: Model) -> tuple[float, ...]:
    """[n_layer]: the time of a kind by the bytes that each skippable sub-layer reads.

    To time each by itself would take long, and the difference would drown in the noise.
    """
    n_bytes = [
        _bytes(sublayer, model) if sublayer.status == "ok" else 0.0 for sublayer in sublayers
    ]
    all_bytes = sum(n_bytes) or 1.0
    return tuple(total_ms * part / all_bytes for part in n_bytes)


def _kv_bytes_per_token(sublayer: Sublayer, model: Model) -> float:
    return sublayer.kv_bytes / model.n_ctx


def _bytes(sublayer: Sublayer, model: Model) -> float:
    """What a one-token pass at the present length of context reads of a sub-layer."""
    return sublayer.weight_bytes + _kv_bytes_per_token(sublayer, model) * model.n_past
