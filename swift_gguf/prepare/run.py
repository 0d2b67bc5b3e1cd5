"""The steps of `swift-gguf prepare`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from swift_gguf.errors import SwiftError, UnsupportedModelError
from swift_gguf.model import Model
from swift_gguf.prepare.attention import add_attention, copied
from swift_gguf.prepare.calibration import answer, replay
from swift_gguf.prepare.narrow_ffn import add_ffn
from swift_gguf.prepare.narrowing import (
    Ffn,
    Narrow,
    best_strength,
    ffns_of,
    fit,
    most_important,
)
from swift_gguf.prepare.statistics import Energy, NormalEquations, TokenMass
from swift_gguf.prepare.texts import Text
from swift_gguf.prepare.weights import BLOCK, Sidecar, Weights, as_stored, bytes_each

HELD_BACK = 8  # one of this many answers is held back from the fit, to measure its error
JUDGED_LAYERS = 4
WEIGHED_TOKENS = 3000
MAX_ACCUMULATED = 3 << 30  # bytes of normal equations in memory at once
Report = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How to make a sidecar.

    Raises:
        SwiftError: a value is out of range.
    """

    width: float = 0.125
    """Share of each FFN's neurons to keep."""
    rank: int | None = None
    """Rank of the linear path; 0: no path; None: a sixth of the embedding size."""
    n_head: int = 65536
    """Tokens of the draft head; 0: drafts use the model's own head."""
    attention: bool = True
    """Copy the attention matrices with fewer bits, if that makes them much smaller."""
    n_tokens: int = 12000
    """Tokens of calibration text."""
    answer_tokens: int = 96
    kind: str = "Q4_0"
    """ggml type of the draft weights.  Four bits are enough for all models, and Q4_0 is the fastest
    four-bit type (docs/lab/drafts.md)."""
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise SwiftError(f"the width is {self.width}; give a share above 0, at most 1")
        if self.rank is not None and (self.rank < 0 or self.rank % 32):
            raise SwiftError(f"the rank is {self.rank}; give a multiple of 32, or 0")
        if self.n_head < 0 or self.n_tokens < 1 or self.answer_tokens < 1:
            raise SwiftError("the head, the calibration and its answers need positive sizes")
        _kind_named(self.kind)


def narrow_width(n_ff: int, share: float) -> int:
    """The number of neurons for a share of `n_ff`, rounded to whole blocks."""
    block = BLOCK if n_ff % BLOCK == 0 and n_ff * share >= BLOCK else 32
    return min(n_ff, max(block, round(n_ff * share / block) * block))


def share_at(layer: int, n_layer: int, width: float) -> float:
    """The share of neurons to keep in a layer; for a width of 1/4, the mean is `width`.

    Late layers keep more: no later layer corrects their errors.  Narrowing the last eight of 28
    FFNs costs as much as narrowing all the others (docs/lab/drafts.md).
    """
    depth = layer / max(1, n_layer - 1)
    return float(width ** (1.5 if depth < 0.57 else 1.0 if depth < 0.71 else 0.5))


class Preparation:
    """Makes the sidecar of a loaded model.

    prompts: token ids of the calibration prompts.
    report: called with the name of the step and the share of it that is done.

    Raises:
        UnsupportedModelError: the model has no dense FFN, or cannot draft.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        options: PrepareOptions | None = None,
        *,
        report: Report = lambda what, share: None,
    ) -> None:
        self.model = model
        self.options = options or PrepareOptions()
        self._prompts = prompts
        self._report = report
        if int(model.metadata("split.count") or 0) > 1:
            raise UnsupportedModelError(
                "a model in several files cannot be prepared; join them first (llama-gguf-split)"
            )
        if model.rollback_refusal:
            raise UnsupportedModelError(
                f"this model cannot use drafts, so a sidecar has no use: {model.rollback_refusal}"
            )
        self.weights = Weights(model.path)
        self.ffns = ffns_of(self.weights, model.n_layer)
        if not self.ffns:
            raise UnsupportedModelError("nothing to prepare: this model has no dense FFN")
        if self.options.rank:
            self._check_rank(self.options.rank)
        self.errors: dict[float, float] = {}
        """Relative error of the narrow FFNs on held-back text, for each ridge strength."""
        self.strength = 0.0

    @property
    def error(self) -> float | None:
        """Relative error of the narrow FFNs on held-back text; None if nothing was fitted."""
        return self.errors.get(self.strength)

    def _check_rank(self, rank: int) -> None:
        if not any(ffn.has_gate for ffn in self.ffns):
            raise UnsupportedModelError(
                "this model's FFNs have no gate, so a linear path is not possible; leave out --rank"
            )
        if rank > (most := max(ffn.n_embd for ffn in self.ffns)):
            raise SwiftError(f"the rank {rank} exceeds the embedding size; give at most {most}")

    # -- sizes and types ---------------------------------------------------------------------------

    def n_narrow(self, ffn: Ffn) -> int:
        return narrow_width(ffn.n_ff, share_at(ffn.layer, self.model.n_layer, self.options.width))

    def rank(self, ffn: Ffn) -> int:
        """The rank of this FFN's linear path."""
        k, wanted = self.n_narrow(ffn), self.options.rank
        block = BLOCK if k % BLOCK == 0 else 32
        rank = -(-ffn.n_embd // 6 // block) * block if wanted is None else wanted
        return rank if ffn.has_gate and k + rank < ffn.n_ff and rank <= ffn.n_embd else 0

    def kind_of(self, row_length: int) -> GGMLQuantizationType:
        """The type for draft weights in rows of this length."""
        for kind in (_kind_named(self.options.kind), GGMLQuantizationType.Q4_0):
            if row_length % GGML_QUANT_SIZES[kind][0] == 0:
                return kind
        return GGMLQuantizationType.F32

    @property
    def odd_columns(self) -> str | None:
        """A note if the down columns get another type because they do not fill whole blocks."""
        for ffn in self.ffns:
            k = self.n_narrow(ffn) + self.rank(ffn)
            whole, kind = self.kind_of(BLOCK), self.kind_of(k)
            if kind != whole:
                block = GGML_QUANT_SIZES[whole][0]
                return f"down columns in {kind.name}: their length {k} is not a multiple of {block}"
        return None

    @property
    def expected_bytes(self) -> int:
        """Approximate size of the sidecar's weights."""
        total = 0.0
        for ffn in self.ffns:
            k = self.n_narrow(ffn) + self.rank(ffn)
            rows = (2 if ffn.has_gate or ffn.is_joined else 1) * k
            total += rows * ffn.n_embd * bytes_each(self.kind_of(ffn.n_embd))
            total += k * ffn.n_embd * bytes_each(self.kind_of(k))
        for matrix, kind in copied(self.weights, self._layers_copied, self.kind_of):
            total += math.prod(self.weights.shape(matrix)) * bytes_each(kind)
        if name := self._head_name:
            _, n_embd = self.weights.shape(name)
            n_head = min(self.options.n_head, self.model.n_vocab)
            total += n_head * n_embd * bytes_each(self.kind_of(n_embd))
        return round(total)

    @property
    def _layers_copied(self) -> list[int]:
        return [ffn.layer for ffn in self.ffns] if self.options.attention else []

    @property
    def _head_name(self) -> str | None:
        names = ("output.weight", "token_embd.weight")
        return next((name for name in names if self.weights.has(name)), None)

    # -- steps -------------------------------------------------------------------------------------

    def answers(self, texts: Sequence[Text] = ()) -> Iterator[Text]:
        """Draws answers until there are enough tokens; continues after `texts`."""
        rng = np.random.default_rng([self.options.seed, len(texts)])
        done, wanted = sum(text.n_tokens for text in texts), self.options.n_tokens
        number = len(texts)
        while done < wanted:
            before = done

            def count(n: int, before: int = before) -> None:
                nonlocal done
                done += n
                self._report("answering", min(1.0, done / wanted))

            prompt = self._prompts[number % len(self._prompts)]
            text = answer(
                self.model, prompt, n_tokens=self.options.answer_tokens, rng=rng, on_pass=count
            )
            done = before + text.n_tokens
            number += 1
            yield text

    def weigh(self, texts: Sequence[Text]) -> tuple[Energy, TokenMass]:
        """Measures how active each neuron is, and how likely each token is."""
        energy, tokens = Energy(self.model.n_layer), TokenMass(self.model.n_vocab)
        some, n_tokens = [], 0  # a part of the texts is enough
        for text in texts:
            some.append(text)
            n_tokens += text.n_tokens
            if n_tokens >= WEIGHED_TOKENS:
                break
        with self.model.observe_ffn(energy):
            for i, text in enumerate(some):
                for _, n_rows in replay(self.model, text):
                    for row in range(n_rows):
                        tokens.add(self.model.logits(row))
                self._report("weighing neurons and tokens", (i + 1) / len(some))
        return energy, tokens

    def fitted(self, texts: Sequence[Text], energy: Energy) -> Iterator[Narrow]:
        """Yields each FFN's kept neurons with their new down columns."""
        less = [ffn for ffn in self.ffns if self.n_narrow(ffn) < ffn.n_ff]
        for ffn in self.ffns:
            if ffn not in less:  # all neurons are kept, so nothing needs a fit
                yield Narrow(ffn, np.arange(ffn.n_ff))
        groups = list(self._groups(less))
        for number, group in enumerate(groups):

            def report(what: str, share: float, number: int = number) -> None:
                self._report(what, (number + share) / len(groups))

            kept = {
                ffn.layer: most_important(self.weights, ffn, energy, self.n_narrow(ffn))
                for ffn in group
            }
            equations = self._equations(texts, kept, group, judges=number == 0, report=report)
            originals = {
                ffn.layer: self.weights.values(ffn.name("down"))[:, kept[ffn.layer]].T
                for ffn in group
            }
            if number == 0:
                ranks = {ffn.layer: self.rank(ffn) for ffn in group}
                self.strength, self.errors = best_strength(
                    equations.fitted, equations.judged, originals, ranks
                )
            for i, ffn in enumerate(group):
                problem = equations.fitted.pop(ffn.layer)
                found = fit(
                    problem,
                    originals[ffn.layer],
                    self.strength,
                    rank=self.rank(ffn),
                    stored=partial(as_stored, kind=self.kind_of(ffn.n_embd)),
                )
                report("solving", (i + 1) / len(group))
                yield Narrow(ffn, kept[ffn.layer], found)

    def _equations(
        self,
        texts: Sequence[Text],
        kept: Mapping[int, NDArray[np.int64]],
        group: Sequence[Ffn],
        *,
        judges: bool,
        report: Report,
    ) -> NormalEquations:
        step = max(1, len(group) // JUDGED_LAYERS)
        judged = frozenset(ffn.layer for ffn in group[step // 2 :: step]) if judges else frozenset()
        with_inputs = frozenset(ffn.layer for ffn in group if self.rank(ffn))
        equations = NormalEquations(kept, group[0].n_embd, judged, with_inputs=with_inputs)
        with self.model.observe_ffn(equations):
            for i, text in enumerate(texts):
                for answer_number, _ in replay(self.model, text):
                    is_held_back = answer_number % HELD_BACK == HELD_BACK - 1
                    equations.settle(is_held_back=is_held_back and answer_number >= 0)
                report("fitting", (i + 1) / len(texts))
        return equations

    def _groups(self, ffns: Sequence[Ffn]) -> Iterator[list[Ffn]]:
        """Groups of FFNs whose normal equations fit `MAX_ACCUMULATED`."""
        group: list[Ffn] = []
        size = 0
        for ffn in ffns:
            k = self.n_narrow(ffn) + (ffn.n_embd if self.rank(ffn) else 0)
            more = 4 * k * (k + ffn.n_embd)
            if group and size + more > MAX_ACCUMULATED:
                yield group
                group, size = [], 0
            group.append(ffn)
            size += more
        if group:
            yield group

    def head_tokens(self, tokens: TokenMass, texts: Sequence[Text]) -> NDArray[np.int64]:
        """The tokens of the draft head, ascending: the most likely ones.

        End-of-generation tokens get additional weight.
        """
        mass = tokens.mass.copy()
        for text in texts:
            for ids in (text.prompt, *text.answers):
                np.add.at(mass, np.asarray(ids, np.int64), 1.0)
        mass[[t for t in range(len(mass)) if self.model.is_eog(t)]] += 1.0
        return np.sort(np.argsort(-mass, kind="stable")[: self.options.n_head])

    def write(self, out: Path, texts: Sequence[Text]) -> int:
        """Runs all remaining steps.  Returns the size of the file's weights, in bytes."""
        sidecar = Sidecar(out)
        widths = [0] * self.model.n_layer
        energy, tokens = self.weigh(texts)
        for narrow in self.fitted(texts, energy):
            add_ffn(sidecar, self.weights, narrow, self.kind_of)
            widths[narrow.ffn.layer] = narrow.width
        add_attention(sidecar, self.weights, self._layers_copied, self.kind_of)
        n_head = self._add_head(sidecar, self.head_tokens(tokens, texts))
        sidecar.finish(self.model.path, widths, n_head)
        return sidecar.n_bytes

    def _add_head(self, sidecar: Sidecar, tokens: NDArray[np.int64]) -> int:
        name = self._head_name
        if name is None or not len(tokens):
            return 0
        kind = self.kind_of(self.weights.shape(name)[1])
        sidecar.add_rows("output.weight", self.weights, tokens, kind, of=name)
        sidecar.add_array("output.ids", tokens.astype(np.int32))
        return len(tokens)


_OFFERED = (
    "F32",
    "F16",
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q4_K",
    "Q3_K",
    "Q2_K",
    "Q5_0",
    "Q5_1",
    "Q4_0",
    "Q4_1",
)


def _kind_named(name: str) -> GGMLQuantizationType:
    if name.upper() not in _OFFERED:
        raise SwiftError(f"there is no type {name!r} for draft weights; use {', '.join(_OFFERED)}")
    return GGMLQuantizationType[name.upper()]
