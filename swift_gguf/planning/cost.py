"""What forward passes cost on this machine, in milliseconds.

Costs are timed for every width, not derived from sizes: they do not even grow with the width
everywhere (repacked matrices are multiplied in groups of rows; the head is often not batched).
Until a pass was timed, its cost is estimated from the bytes that it reads.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, pairwise
from statistics import median_low
from typing import Any

from swift_gguf.errors import SubnetworkError
from swift_gguf.model import Model
from swift_gguf.subnetwork import SubNetwork

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
PARTS = ("passes", "sub-layers", "sidecar", "rows", "switch")
"""Parts of a measurement."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Times of passes at one context length, all in milliseconds.

    Raises:
        ValueError: a time is negative or not finite, or lengths do not match.
    """

    pass_ms: tuple[tuple[int, float], ...]
    """(width, ms) of full passes with logits for every row; widths ascend from 1.  The width of a
    pass is its number of tokens."""
    attention_ms: tuple[float, ...]
    """[n_layer], each attention in a one-token pass; 0 where it cannot be skipped."""
    ffn_ms: tuple[float, ...]
    """[n_layer], each FFN, likewise."""
    kv_ms: tuple[float, ...]
    """[n_layer], the part of `attention_ms` that each token of the context adds."""
    head_ms: float
    """The logits of one row in a one-token pass."""
    n_kv: int
    """Context length of the measurement, in tokens."""
    more_ms: float = 0.0
    """What each token after the first adds to a pass, as long as only one token was timed."""
    row_ms: float = 0.0
    """The logits of one more row, in a pass of several tokens."""
    switch_ms: float = 0.0
    """Extra time of a one-token pass after a pass of another width, which has another graph."""
    narrow_ms: tuple[float, ...] = ()
    """[n_layer], the part of `ffn_ms` that the sidecar's narrow FFN saves; empty: no sidecar."""
    draft_head_ms: float = 0.0
    """Time that the sidecar's head saves."""
    untimed: tuple[str, ...] = ()
    """Those of `PARTS` that were not timed: estimated from the bytes that passes read, or 0.
    Widths that were not timed are not in `pass_ms`."""
    is_provisional: bool = False
    """A quick measurement, to be repeated when there is time."""
    is_busy: bool = False
    """Measured while other programs used the CPUs: to be repeated, and trusted least."""

    def __post_init__(self) -> None:
        widths = [width for width, _ in self.pass_ms]
        if widths[:1] != [1] or any(a >= b for a, b in pairwise(widths)):
            raise ValueError(f"the widths {widths} do not ascend from 1")
        layers = (self.attention_ms, self.ffn_ms, self.kv_ms)
        if not self.ffn_ms or len({len(kind) for kind in layers}) != 1:
            raise ValueError("times of different numbers of layers, or of none")
        times = [ms for _, ms in self.pass_ms]
        single = (self.head_ms, self.more_ms, self.row_ms, self.switch_ms, self.draft_head_ms)
        if len(self.narrow_ms) not in (0, self.n_layer):
            raise ValueError("times of narrow FFNs for another number of layers")
        if not all(0 <= ms < math.inf for ms in chain(times, single, self.narrow_ms, *layers)):
            raise ValueError("a time is negative or not finite")
        if not set(self.untimed) <= set(PARTS):
            raise ValueError(f"{self.untimed!r:.60} are not parts of a measurement")
        if min(times) == 0 or self.n_kv < 0:
            raise ValueError("a pass that takes no time, or a context of negative length")

    @property
    def n_layer(self) -> int:
        return len(self.ffn_ms)

    @property
    def trust(self) -> int:
        """0: estimated, or measured on a busy machine; 1: provisional; 2: neither.  Costs are never
        replaced by less trusted ones."""
        return 0 if self.is_busy or self.is_estimate else 2 - self.is_provisional

    @property
    def n_timed(self) -> int:
        """Number of timed parts: grows until everything is measured."""
        return len(self.pass_ms) - len(self.untimed)

    @property
    def is_estimate(self) -> bool:
        """Whether not even a pass of one token was timed.  Costs are right relative to each other,
        as far as bytes tell."""
        return "passes" in self.untimed

    @property
    def is_sure(self) -> bool:
        """Whether these costs are final."""
        return not (self.is_busy or self.is_provisional)

    def draft_ms(self, subnetwork: SubNetwork) -> float:
        """A one-token pass of this sub-network.

        Raises:
            SubnetworkError: it is for a model with another number of layers.
        """
        if subnetwork.n_layer != self.n_layer:
            raise SubnetworkError(
                f"a sub-network of {subnetwork.n_layer} layers has no cost in a model of "
                f"{self.n_layer}; use one made for this model"
            )
        saved = math.fsum(  # sets have no order; this sum does not depend on it
            [self.attention_ms[layer] for layer in subnetwork.skip_attn]
            + [self.ffn_ms[layer] for layer in subnetwork.skip_ffn]
            + [self.narrow_ms[layer] for layer in subnetwork.narrow_ffn if self.narrow_ms]
            + [self.draft_head_ms if subnetwork.draft_head else 0.0]
        )
        return max(0.0, self.pass_ms[0][1] - saved)

    def verify_ms(self, width: int) -> float:
        """A full pass of `width` tokens with logits for every row.

        Linear between measured widths.  Beyond the last one, the slope is that of the last two
        widths or the average slope, whichever is larger.  With a single width, it is `more_ms`.
        """
        if width < 1:
            raise ValueError(f"a pass of {width} tokens")
        points = self.pass_ms
        if width == 1 or len(points) == 1:
            return points[0][1] + (width - 1) * self.more_ms
        right = min(bisect_left(points, (width, 0.0)), len(points) - 1)
        (low, low_ms), (high, high_ms) = points[right - 1 : right + 1]
        slope = (high_ms - low_ms) / (high - low)
        if width > high:  # the last step may be flat by chance
            slope = max(slope, (high_ms - self.pass_ms[0][1]) / high, 0.0)
        return high_ms + (width - high) * slope

    def at(self, n_kv: int) -> Costs:
        """The costs at another context length, where attention reads more or less of the KV cache.

        Computed from bytes: every row of a pass is assumed to read the cache itself, as on a CPU.
        """
        more = n_kv - self.n_kv
        growth = more * math.fsum(self.kv_ms)
        least = self.pass_ms[0][1] / 10  # extrapolated to a much shorter context
        return replace(
            self,
            pass_ms=tuple((w, max(least, ms + w * growth)) for w, ms in self.pass_ms),
            attention_ms=tuple(
                max(0.0, ms + more * slope)
                for ms, slope in zip(self.attention_ms, self.kv_ms, strict=True)
            ),
            n_kv=n_kv,
        )

    def scaled(self, factor: float) -> Costs:
        """All times, that many times as long."""

        def layers(times: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(factor * ms for ms in times)

        return replace(
            self,
            pass_ms=tuple((width, factor * ms) for width, ms in self.pass_ms),
            attention_ms=layers(self.attention_ms),
            ffn_ms=layers(self.ffn_ms),
            kv_ms=layers(self.kv_ms),
            narrow_ms=layers(self.narrow_ms),
            head_ms=factor * self.head_ms,
            more_ms=factor * self.more_ms,
            row_ms=factor * self.row_ms,
            switch_ms=factor * self.switch_ms,
            draft_head_ms=factor * self.draft_head_ms,
        )

    def with_pass(self, width: int, ms: float) -> Costs:
        """With the time of a full pass of this width, in place of an earlier one."""
        return replace(self, pass_ms=tuple(sorted((dict(self.pass_ms) | {width: ms}).items())))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, for `from_dict`."""
        return asdict(self) | {
            "pass_ms": [list(point) for point in self.pass_ms],
            "attention_ms": list(self.attention_ms),
            "ffn_ms": list(self.ffn_ms),
            "kv_ms": list(self.kv_ms),
            "narrow_ms": list(self.narrow_ms),
            "untimed": list(self.untimed),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Costs:
        """The inverse of `as_dict`.

        Raises:
            ValueError: the values are of another kind, incomplete or impossible.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise ValueError(f"costs need {', '.join(sorted(names))}")
        points = [_list(point) for point in _list(values["pass_ms"])]
        if any(len(point) != 2 for point in points):
            raise ValueError("pass_ms holds pairs of width and milliseconds")
        return cls(
            pass_ms=tuple((_whole(width), _real(ms)) for width, ms in points),
            attention_ms=tuple(_real(ms) for ms in _list(values["attention_ms"])),
            ffn_ms=tuple(_real(ms) for ms in _list(values["ffn_ms"])),
            kv_ms=tuple(_real(ms) for ms in _list(values["kv_ms"])),
            head_ms=_real(values["head_ms"]),
            n_kv=_whole(values["n_kv"]),
            more_ms=_real(values["more_ms"]),
            row_ms=_real(values["row_ms"]),
            switch_ms=_real(values["switch_ms"]),
            narrow_ms=tuple(_real(ms) for ms in _list(values["narrow_ms"])),
            draft_head_ms=_real(values["draft_head_ms"]),
            untimed=tuple(_list(values["untimed"])),
            is_provisional=_truth(values["is_provisional"]),
            is_busy=_truth(values["is_busy"]),
        )


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r:.40} is not a list")
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 1 << 53:
        raise ValueError(f"{str(value)[:40]!r} is not a whole number")
    return value


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r:.40} is neither true nor false")
    return value


def _real(value: object) -> float:
    return value if isinstance(value, float) else float(_whole(value))


class CostsHere:
    """The costs at the current context length, learned from live passes and corrected by them.

    What nobody has timed yet is learned: the time of a width is the lower median of its first
    `FEW` passes, as other programs only ever add time.  The first two plain passes also set the
    scale of all that is estimated from bytes.

    After that there are three corrections, all factors: the speed of all passes (the machine is
    busy, or hot), the cost of several tokens relative to one (faster memory helps a single token
    most), and the cost of each width relative to both.
    """

    STEP = 256  # tokens; llama.cpp pads what attention reads to a multiple of this
    MAX_WIDTH = 65
    FEW = 5
    """Passes from which the time of a width is learned."""
    PLAIN = 2
    """Plain passes after which their time is known."""
    KEPT = 255 / 256  # per one-token pass, so that a width that was given up is tried again
    NOISE = 0.3  # a larger surprise counts as this much: it may be a hiccup; natural logarithm
    LOADED = math.log(1.25)  # slower than measured by this much: other programs use the machine

    def __init__(self, model: Model, costs: Costs) -> None:
        self._model = model
        self.update(costs)

    def update(self, costs: Costs) -> None:
        """Starts again from new measurements."""
        self._costs = costs
        self._speed = self._together = 0.0  # natural logarithms of the corrections
        self._beside: dict[int, float] = {}
        self._first_ms: dict[int, list[float]] = {}  # of widths that are being learned
        self._set(costs)

    @property
    def measured(self) -> Costs:
        """The measured and learned costs, without corrections."""
        return self._costs

    @property
    def is_known(self) -> bool:
        """Whether plain passes were timed: costs are milliseconds, not only shares of a pass."""
        return not self._costs.is_estimate

    def _set(self, costs: Costs) -> None:
        self._at = costs
        self._measured = [0.0, *(costs.verify_ms(width) for width in range(1, self.MAX_WIDTH + 1))]
        self._correct()

    def _correct(self) -> None:
        self._factor = math.exp(self._speed)
        several = math.exp(self._together)
        self._table = [
            ms * self._factor * (several if width > 1 else 1.0)
            for width, ms in enumerate(self._measured)
        ]
        for width, log in self._beside.items():
            self._table[width] *= math.exp(log)

    def _now(self) -> Costs:
        n_kv = -(-self._model.n_past // self.STEP) * self.STEP
        if self._at.n_kv != n_kv:
            self._set(self._costs.at(n_kv))
        return self._at

    def draft_ms(self, subnetwork: SubNetwork) -> float:
        """See `Costs.draft_ms`."""
        return self._now().draft_ms(subnetwork) * self._factor

    def verify_ms(self, width: int) -> float:
        """See `Costs.verify_ms`."""
        self._now()
        if width > self.MAX_WIDTH:
            return self._at.verify_ms(width) * self._factor * math.exp(self._together)
        return self._table[width]

    def observe(self, width: int, ms: float) -> None:
        """A full pass of `width` tokens, all with logits, took `ms`."""
        self._now()
        if not 1 <= width <= self.MAX_WIDTH or ms <= 0.0 or self._learns(width, ms):
            return
        surprise = math.log(ms / self._table[width])
        surprise = max(-self.NOISE, min(self.NOISE, surprise))
        if width == 1:  # the other widths are compared with it
            self._speed += surprise / 16
            self._together *= self.KEPT
        else:
            # mostly to all widths: otherwise drafts that lose time move on to an untried width
            self._together += surprise / 24
            self._beside[width] = self._beside.get(width, 0.0) + surprise / 32
            self._speed += surprise / 64
        self._correct()

    def _learns(self, width: int, ms: float) -> bool:
        """Learns the time of a width that nobody has timed, from its first passes.  False: it is
        known, and can only be corrected."""
        is_timed = width in dict(self._costs.pass_ms) if width > 1 else self.is_known
        if width not in self._first_ms and is_timed:
            return False
        if width > 1 and not self.is_known:
            return True  # of no use alone: what counts is the time relative to a plain pass
        seen = self._first_ms.setdefault(width, [])
        if len(seen) == self.FEW:
            return False
        # the corrections are applied to it later
        seen.append(ms / self._factor / (math.exp(self._together) if width > 1 else 1.0))
        known_ms = median_low(seen)
        if width > 1:
            here = self._at.with_pass(width, known_ms).at(self._costs.n_kv)
            self._costs = self._costs.with_pass(width, dict(here.pass_ms)[width])
        elif self.is_known:
            here = self._at.with_pass(1, known_ms).at(self._costs.n_kv)
            self._costs = self._costs.with_pass(1, here.pass_ms[0][1])
        else:
            self._costs = self._costs.scaled(known_ms / self._at.pass_ms[0][1])
            if len(seen) == self.PLAIN:
                untimed = tuple(part for part in self._costs.untimed if part != "passes")
                self._costs = replace(self._costs, untimed=untimed)
        self._set(self._costs)
        return True

    def refreshed(self) -> Costs:
        """The measured costs with the corrections by width.  Without them while other programs use
        the machine, as they would be wrong afterwards."""
        if self._speed > self.LOADED:
            return self._costs
        pass_ms = tuple(
            (width, ms * math.exp(self._beside.get(width, 0.0) + self._together * (width > 1)))
            for width, ms in self._costs.pass_ms
        )
        return replace(self._costs, pass_ms=pass_ms)


# -- where they are kept ---------------------------------------------------------------------------


def context_bucket(n_kv: int) -> int:
    """Context lengths up to this power of two share measured costs."""
    return max(CostsHere.STEP, 1 << (n_kv - 1).bit_length())


def costs_key(model: Model, costs: Costs) -> str:
    """The key of these costs in a profile."""
    return f"{model.machine_key}@{context_bucket(costs.n_kv)}"


NEAR = 2
"""Within so many buckets, better measured costs are preferred to nearer ones."""


def stored_costs(model: Model, profile_costs: Mapping[str, Mapping[str, Any]]) -> Costs | None:
    """The costs in a profile that were measured on this machine at the nearest context length.

    None if there are none.
    """
    prefix = f"{model.machine_key}@"
    measured = [
        Costs.from_dict(values) for key, values in profile_costs.items() if key.startswith(prefix)
    ]
    n_past = model.n_past

    def rank(costs: Costs) -> tuple[float, ...]:
        """Nearby context lengths differ by less than the error of a quick measurement."""
        distance = abs(math.log2(context_bucket(costs.n_kv) / context_bucket(n_past)))
        return (distance if distance > NEAR else 0.0, -costs.trust, distance)

    return min(measured, key=rank, default=None)
