"""A machine without weights: a text, sources that guess it, and what passes over it take.

Every token of the text is its own position; guesses that are wrong are negative.  What is right
where was drawn beforehand, so that whoever drafts on it meets the same luck.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from swift_gguf.drafting.passes import Passes
from swift_gguf.drafting.source import Cycle
from swift_gguf.drafting.tree import ROOT, Offer, Tree
from swift_gguf.drafting.verification import verify
from swift_gguf.planning.cost import PARTS, WIDTHS, Costs, CostsHere
from swift_gguf.planning.measuring import MORE
from swift_gguf.planning.planner import Drafts, Planner

PROMPT_N = 8
LENGTH = 4096


def interpolated(points: dict[int, float]) -> Callable[[int], float]:
    return lambda width: float(np.interp(width, list(points), list(points.values())))


CURVES: dict[str, Callable[[int], float]] = {
    "flat": lambda width: 10 + 0.05 * (width - 1),  # as on a GPU
    "linear": lambda width: 10.0 * width,
    "half": lambda width: 6 + 4.0 * width,
    "steps": lambda width: 6 + 4.0 * -(-width // 4),
    # Qwen2.5-Coder-1.5B on a CPU: rows are multiplied in groups of four
    "Q4_0": interpolated({1: 95, 2: 144, 3: 176, 4: 122, 8: 223, 16: 312, 33: 640}),
    "Q4_K_M": interpolated({1: 95, 2: 146, 3: 178, 4: 154, 8: 277, 16: 359, 33: 740}),
    # the same Q4_0 with our kernels for few columns: a second row is free, further ones are not
    "second row free": interpolated(
        {1: 40, 2: 40.4, 3: 49, 4: 60, 6: 77, 8: 102, 16: 183, 33: 370}
    ),
}
"""Milliseconds of a pass by its width."""


@dataclass
class Guesses:
    """What a source would say at every position, and how sure it is of it.

    shares: of the likeliest token, the next one and so on: how often it is the right one.
    confidence: in the likeliest; in each further one a quarter of the one before.
    before: other shares, up to a position.
    knows: where it says anything.
    """

    shares: Sequence[float]
    name: str = "ngram"
    confidence: float = 0.85
    seed: int = 0
    before: tuple[Sequence[float], int] = ((), 0)
    knows: Callable[[int], bool] = lambda position: True

    @cached_property
    def _luck(self) -> list[float]:
        return [float(x) for x in np.random.default_rng(self.seed).random(LENGTH)]

    def at(self, position: int, *, is_true: bool) -> list[Offer]:
        """For the token at `position`, after the text itself or after something else."""
        if not self.knows(position):
            return []
        shares = self.before[0] if position < self.before[1] else self.shares
        right = bisect_right(list(accumulate(shares)), self._luck[position])
        return [
            Offer(
                position if is_true and rank == right else -1 - rank,
                self.confidence / 4**rank,
                self.name,
            )
            for rank in range(len(shares))
        ]


@dataclass
class FakeLookup:
    guesses: Guesses
    asked: int = 0

    @property
    def name(self) -> str:
        return self.guesses.name

    def follow(self, text: Sequence[int]) -> None:
        self._position = len(text)
        assert text[-1] == len(text) - 1

    def offers(self, path: Sequence[int]) -> list[Offer]:
        self.asked += 1
        return self.guesses.at(self._position + len(path), is_true=min(path, default=0) >= 0)


@dataclass
class FakeTarget:
    """What the planner and passes ask of a model; a draft's passes see its guesses."""

    guesses: Guesses | None = None
    n_branches: int = 44
    tokens: list[int] = field(default_factory=lambda: list(range(PROMPT_N)))
    n_drafted: int = 0
    _nodes: list[tuple[int, int]] = field(default_factory=list)  # token, parent
    _first: int = 0

    @property
    def n_past(self) -> int:
        return len(self.tokens)

    def is_eog(self, token: int) -> bool:
        return False

    def decode_tree(
        self, tokens: Sequence[int], parents: Sequence[int], *, subnetwork: object
    ) -> None:
        self._first = len(self._nodes)
        self._nodes += zip(tokens, parents, strict=True)
        self.n_drafted += len(tokens)

    def rollback(self, n_past: int) -> None:
        assert n_past == self.n_past
        self._nodes.clear()

    def top(self, row: int, k: int) -> tuple[list[int], list[float]]:
        assert self.guesses is not None
        node, depth, is_true = self._first + row, 0, True
        while node >= 0:
            token, node = self._nodes[node]
            depth, is_true = depth + 1, is_true and token >= 0
        offers = self.guesses.at(self.n_past + depth, is_true=is_true)[:k]
        return [offer.token for offer in offers], [offer.probability for offer in offers]


@dataclass
class Machine:
    """Plays cycles; the clock runs by the true costs, what is observed is noisy.

    measured: what the costs were when they were measured; None: as they are.
    priced_ms: what a source's pass is believed to take; None: what it takes.
    stall_ms: what drafts are observed to take beside that.
    is_cold: nothing was timed when it begins: costs are estimates.
    """

    curve: Callable[[int], float]
    lookups: Sequence[Guesses] = ()
    passes: Guesses | None = None
    pass_ms: float = 5.0
    seed: int = 1
    noise: float = 0.1
    hiccups: float = 0.01
    options: dict[str, Any] = field(default_factory=dict)
    measured: Callable[[int], float] | None = None
    priced_ms: float | None = None
    stall_ms: float = 0.0
    is_cold: bool = False

    def __post_init__(self) -> None:
        self.model = FakeTarget(self.passes)
        self.ms, self.cycles = 0.0, list[Cycle]()
        self.positions: list[int] = []  # where each cycle began
        self._rng = np.random.default_rng(self.seed)
        layer = (0.0,)
        costs = Costs(
            pass_ms=tuple((width, (self.measured or self.curve)(width)) for width in WIDTHS),
            attention_ms=layer,
            ffn_ms=layer,
            kv_ms=layer,
            head_ms=0.0,
            n_kv=256,
        )
        if self.is_cold:
            costs = replace(
                costs, pass_ms=((1, 3.0),), more_ms=3.0 * MORE, is_provisional=True, untimed=PARTS
            )
        model: Any = self.model
        self.prices = CostsHere(model, costs)
        drafts = []
        if self.passes is not None:
            priced_ms = self.pass_ms if self.priced_ms is None else self.priced_ms
            drafts.append(Drafts(Passes(self.passes.name, model), lambda: priced_ms))
        self.planner = Planner(
            model,
            self.prices,
            lookups=[FakeLookup(each) for each in self.lookups],
            drafts=drafts,
            **self.options,
        )

    @property
    def n_tokens(self) -> int:
        return self.model.n_past - PROMPT_N

    @property
    def rate(self) -> float:
        return self.n_tokens / self.ms

    def cycle(self, *, n_max: int = 32) -> Cycle:
        position = self.model.n_past
        before = self.model.n_drafted
        tree = self.planner.draft(position, n_max=n_max) if n_max else Tree()
        n_drafted = self.model.n_drafted - before
        draft_ms = n_drafted * self.pass_ms if n_drafted else 0.0
        depth = {ROOT: 1}
        for node, parent in enumerate(tree.parents):
            depth[node] = depth[parent] + 1
        verdict = verify(tree, choose=lambda node: position + depth[node], is_eog=self.model.is_eog)
        verify_ms = self.curve(len(tree) + 1)
        self.positions.append(position)
        self.model.tokens += range(position, position + len(verdict.tokens))
        self.ms += draft_ms + verify_ms
        cycle = Cycle(
            tree,
            verdict,
            draft_s=(draft_ms * self._luck() + self.stall_ms) / 1e3,
            verify_s=verify_ms * self._luck() / 1e3,
        )
        self.planner.observe(cycle)
        self.cycles.append(cycle)
        return cycle

    def _luck(self) -> float:
        hiccup = 5.0 if self._rng.random() < self.hiccups else 1.0
        return hiccup * float(np.exp(self.noise * self._rng.normal()))

    def run(self, n_tokens: int) -> Machine:
        """Until so many more are generated."""
        end = self.n_tokens + n_tokens
        while self.n_tokens < end:
            self.cycle()
        return self


def plain_rate(machine: Machine) -> float:
    return 1.0 / machine.curve(1)


def fixed_rate(
    machine: Machine, guesses: Guesses, n: int, n_tokens: int, *, pass_ms: float = 0.0
) -> float:
    """Tokens a millisecond of always n draft tokens, the likeliest, from one source."""
    position, ms = PROMPT_N, 0.0
    while position < PROMPT_N + n_tokens:
        accepted = 0
        while accepted < n:
            offers = guesses.at(position + 1 + accepted, is_true=True)
            if not offers or offers[0].token < 0:
                break
            accepted += 1
        ms += machine.curve(n + 1) + n * pass_ms
        position += 1 + accepted
    return (position - PROMPT_N) / ms


def best_fixed(machine: Machine, n_tokens: int, *, n_max: int = 12) -> float:
    """Of all lengths and sources; plain decoding is the length 0."""
    sources = [(each, 0.0) for each in machine.lookups]
    if machine.passes is not None:
        sources.append((machine.passes, machine.pass_ms))
    return max(
        fixed_rate(machine, guesses, n, n_tokens, pass_ms=pass_ms)
        for guesses, pass_ms in sources
        for n in range(n_max + 1)
    )
