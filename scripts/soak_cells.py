#!/usr/bin/env python3
"""Trees, rollbacks, windows and states leave the cache's cells as if tokens had come one by one.

Two contexts of one generated model say the same text: one through trees, windows that are scored
(some broken off) and prompts behind parked cells, with a Ctrl-C at any line now and then, the other
plainly.  After every step both must hold the same tokens, and give the same logits to the bit.
`--seed S --first N --rounds 1` repeats a round.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np

# tests/ is not installed with the package
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from swift_gguf.errors import StoppedError, SwiftError
from swift_gguf.model import Model, ModelOptions
from swift_gguf.model import cells as cells_module
from swift_gguf.model import model as model_module
from swift_gguf.model.cells import Cells
from swift_gguf.tokens import common_prefix
from tests.fixtures.tiny_gguf import write_tiny

FAMILIES = ("llama", "qwen3", "gemma3")
QUANTS = ("Q8_0", "Q4_1")
STEPS = 60
LAST_TOKEN = 250
Compared = tuple[np.ndarray, np.ndarray] | None
"""The logits of both contexts."""


class Round:
    """The same text in two contexts."""

    def __init__(self, rng: random.Random, folder: Path, stack: ExitStack) -> None:
        family, quant = rng.choice(FAMILIES), rng.choice(QUANTS)
        path = folder / f"{family}-{quant}.gguf"
        if not path.exists():
            write_tiny(path, family, quant=quant, n_layer=6)
        n_ctx = rng.choice((256, 512, 1024))
        options = ModelOptions(
            n_ctx=n_ctx,
            n_batch=128,
            n_threads=rng.choice((1, 2)),  # more split one token's attention among them
            n_gpu_layers=0,
        )
        self._rng = rng
        self.model, self.plain = (stack.enter_context(Model(path, options)) for _ in range(2))
        if rng.random() < 0.5:  # as where there are no kernels of ours: gaps are closed
            self.model._at_every_width = self.plain._at_every_width = False
        self.name = f"{path.name} with {n_ctx} cells, {options.n_threads} threads"
        self.counts: Counter[str] = Counter()
        self._decode(rng.choice((rng.randint(5, 100), n_ctx - 120)))

    def step(self) -> str:
        """Runs a random operation; returns its name, and what is wrong afterwards, or None."""
        model = self.model
        if model.n_ctx - model.n_past < 2:
            self._rollback(model.n_ctx // 2)
            return ""
        acts = {
            "a tree": (55, self._tree),
            "a rollback": (15, self._rolled_back),
            "a window": (15, self._window),
            "a prompt": (12, self._prompt),
            "a state": (3, self._states),
            "a Ctrl-C": (15, self._interrupted),
        }
        weights = [weight for weight, _ in acts.values()]
        (what,) = self._rng.choices(list(acts), weights)
        try:
            compared = acts[what][1]()
        except SwiftError as error:
            return f"{what} raised {error}"
        self.counts["steps"] += 1
        self.counts["parked"] += model.cells.n_parked > 0
        if model.tokens != self.plain.tokens:
            return f"{what} left other tokens"
        return "" if compared is None or np.array_equal(*compared) else f"{what} gave other logits"

    def _tokens(self, n: int) -> list[int]:
        return [self._rng.randrange(5, LAST_TOKEN) for _ in range(n)]

    def _decode(self, n: int) -> Compared:
        tokens, exact = self._tokens(n), self._rng.random() < 0.5
        for model in (self.model, self.plain):
            model.decode(tokens, exact=exact)
        return self.model.logits(0), self.plain.logits(0)

    def _rollback(self, n_past: int) -> None:
        for model in (self.model, self.plain):
            model.rollback(n_past)

    def _rolled_back(self) -> Compared:
        n_past = self.model.n_past
        self._rollback(max(1, n_past - self._rng.choice((1, 2, 3, 12, 60))))
        return self._decode(1)

    def _window(self) -> Compared:
        """Scores a window of the text; may stop in the middle."""
        rng, model = self._rng, self.model
        n = min(rng.choice((8, 32)), model.n_past, model.cells.free + model.cells.n_parked)
        if n < 1:
            return None
        if rng.random() < 0.5:
            model.stop.raise_()
        try:
            model.redecode(rng.randint(0, model.n_past - n), n, own_past=rng.random() < 0.2)
        except StoppedError:
            self.counts["stopped"] += 1
        finally:
            model.stop.lower()
        return None

    def _states(self) -> Compared:
        """Both contexts save their state and load it."""
        for model in (self.model, self.plain):
            text, api = list(model.tokens), model._api
            model.hand_over()
            n_bytes = api.llama_state_get_size(model.ctx)
            state = (ctypes.c_uint8 * n_bytes)()
            n_bytes = api.llama_state_get_data(model.ctx, state, n_bytes)
            if api.llama_state_set_data(model.ctx, state, n_bytes) != n_bytes:
                raise RuntimeError("the state could not be loaded")
            model.assume(text)
        return None

    def _prompt(self) -> Compared:
        """Decodes several tokens at once; 64 and more use the kernels of prompt processing."""
        n = self._rng.choice((1, self._rng.randint(2, 30), self._rng.randint(64, 100)))
        return self._decode(n) if n <= self.model.n_ctx - self.model.n_past else None

    def _tree(self) -> Compared:
        model, plain = self.model, self.plain
        n = min(self._rng.choice((1, 3, 8, 30)), model.n_ctx - model.n_past - 1)
        if n > model.room:
            n = 1
        parents = self._parents(n)
        tokens, path = self._tokens(n), _path(parents, self._rng.randrange(n))
        model.decode_tree(tokens, parents)
        row = model.logits(path[-1])
        model.keep(path)
        for node in path:
            plain.decode([tokens[node]])
        return row, plain.logits(0)

    def _interrupted(self) -> Compared:
        """Ctrl-C at a random line of an operation on one context; the other gets the result."""
        rng, model = self._rng, self.model
        keep, n = (
            rng.randint(1, model.n_past),
            max(1, min(8, model.room, model.n_ctx - model.n_past - 1)),
        )
        parents, tokens = self._parents(n), self._tokens(n)

        def tree() -> None:
            model.decode_tree(tokens, parents)
            model.keep(_path(parents, n - 1))

        def handed_over() -> None:
            model.hand_over()
            model.take_back()

        acts = (
            tree,
            handed_over,
            model.clear,
            lambda: model.rollback(keep),
            lambda: model.decode(tokens),
            lambda: model.redecode(keep - 1, 1),
            model.cells.close_gaps,
        )
        if interrupted_at(rng.randint(1, 120), rng.choice(acts)):
            self.counts["interrupted"] += 1
        if rng.random() < 0.5:
            model.rollback(model.n_past)  # as the engine does
        (token,) = self._tokens(1)
        model.decode([token])
        left = model.tokens[:-1]
        same = common_prefix(self.plain.tokens, left)
        self.plain.rollback(same) if same else self.plain.clear()
        for each in [*left[same:], token]:
            self.plain.decode([each])
        return model.logits(0), self.plain.logits(0)

    def _parents(self, n: int) -> list[int]:
        rng = self._rng
        if rng.random() < 0.5:
            return [-1, *(rng.randint(max(0, node - 3), node - 1) for node in range(1, n))]
        parents = list(range(-1, rng.randrange(n)))  # a deep chain, then siblings
        while len(parents) < n:
            parents.append(rng.choice((0, len(parents) - 1, max(len(parents) - 2, 0))))
        return parents


def interrupted_at(n: int, act: Callable[[], None]) -> bool:
    """Does it; is there an n-th line of our own that runs meanwhile, for a Ctrl-C to come at?"""
    left = n
    files = {cells_module.__file__, model_module.__file__}

    def line(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        left -= event == "line"
        if left == 0 and event == "line":
            sys.settrace(None)
            raise KeyboardInterrupt
        return line

    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename in files else None)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def _path(parents: Sequence[int], node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def soak(
    *,
    seed: int,
    numbers: range,
    control: bool = False,
    seconds: float = float("inf"),
    tell: Callable[[str], None] = print,
) -> Counter[str]:
    """Runs rounds until there are no more, or no more time.

    control: gaps are only forgotten, not closed.
    """
    total: Counter[str] = Counter()
    end = time.monotonic() + seconds
    with ExitStack() as outer:
        if control:
            outer.enter_context(mock.patch.object(Cells, "close_gaps"))
        folder = Path(outer.enter_context(tempfile.TemporaryDirectory()))
        for number in numbers:
            with ExitStack() as stack:
                drawn = Round(random.Random(f"{seed}/{number}"), folder, stack)
                for step in range(STEPS):
                    if wrong := drawn.step():
                        tell(f"seed {seed} round {number} step {step}: {drawn.name}: {wrong}")
                        total["wrong"] += 1
                        break
                total += drawn.counts
            total["rounds"] += 1
            if time.monotonic() > end:
                break
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end early")
    parser.add_argument("--control", action="store_true", help="leave gaps open: must fail")
    options = parser.parse_args()
    start = time.monotonic()
    total = soak(
        seed=options.seed,
        numbers=range(options.first, options.first + options.rounds),
        control=options.control,
        seconds=options.seconds,
    )
    print(
        f"{total['rounds']} rounds from {options.first} on, seed {options.seed}, "
        f"{time.monotonic() - start:.0f} s: {total['steps']} steps, {total['parked']} of them with "
        f"parked cells, {total['stopped']} broken off, {total['interrupted']} interrupted, "
        f"{total['wrong']} wrong"
    )
    return int(total["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
