"""Decoding one prompt plainly and speculatively, and telling a bug from a near tie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from swift_gguf.drafting import LayerSkip
from swift_gguf.drafting.policy import Threshold
from swift_gguf.engine import generate
from swift_gguf.model import Model
from swift_gguf.sampling import Sampler, SamplingOptions
from swift_gguf.speculation import TREES
from swift_gguf.stats import Stats
from swift_gguf.subnetwork import SubNetwork
from swift_gguf.text import encode, render_chat

GREEDY = SamplingOptions(temperature=0)


def chat_tokens(model: Model, text: str) -> list[int]:
    return encode(model, render_chat(model, [{"role": "user", "content": text}]))


def light_skip(model: Model) -> SubNetwork:
    """A sub-network whose drafts are often right: every sixth FFN and every ninth attention out."""
    middle = range(1, model.n_layer - 1)
    return SubNetwork(
        n_layer=model.n_layer, skip_ffn=frozenset(middle[2::6]), skip_attn=frozenset(middle[4::9])
    )


def decode(
    model: Model,
    prompt: Sequence[int],
    *,
    sampling: SamplingOptions = GREEDY,
    subnetwork: SubNetwork | None = None,
    max_tokens: int = 32,
    draft_max: int = 5,
    p_min: float = 0.0,
    tree: str = "chain",
) -> tuple[list[int], Stats]:
    """The tokens and the statistics of one generation from an empty context."""
    model.clear()
    stats = Stats()
    drafter = (
        LayerSkip(
            model,
            subnetwork,
            policy=Threshold(p_min, joint_min=1.0 if tree == "chain" else 0.02),
            shape=TREES[tree],
        )
        if subnetwork
        else None
    )
    with Sampler(model, sampling, prompt=prompt) as sampler:
        tokens = generate(
            model,
            prompt,
            sampler=sampler,
            drafter=drafter,
            draft_max=draft_max,
            max_tokens=max_tokens,
            stats=stats,
        )
        return [token.id for token in tokens], stats


def seeded(seed: int) -> SamplingOptions:
    return replace(SamplingOptions(), seed=seed)


@dataclass(frozen=True)
class Divergence:
    """Where a greedy text first differs, and whether rounding explains it."""

    position: int
    gap: float
    """Between the target's logits of the two tokens, at width 1."""
    noise: float
    """The largest change of any logit there, between width 1 and the widths of verification."""

    @property
    def is_near_tie(self) -> bool:
        # each of the two logits may move by the noise, in opposite directions
        return self.gap <= 2 * self.noise


def explain(
    model: Model, prompt: Sequence[int], plain: Sequence[int], other: Sequence[int]
) -> Divergence | None:
    """None if the texts are equal, else the first difference measured on the model itself."""
    if list(plain) == list(other):
        return None
    pairs = zip(plain, other, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(plain), len(other)))
    if position >= min(len(plain), len(other)):
        # one text ended where the other went on: compare with the end-of-generation token
        return Divergence(position, *_end_or_not(model, prompt, plain, other, position))
    rows = _rows(model, [*prompt, *plain[:position]])
    gap = abs(float(rows[0][plain[position]] - rows[0][other[position]]))
    return Divergence(position, gap, _noise(rows))


def _end_or_not(
    model: Model, prompt: Sequence[int], plain: Sequence[int], other: Sequence[int], position: int
) -> tuple[float, float]:
    longer = plain if len(plain) > len(other) else other
    rows = _rows(model, [*prompt, *longer[:position]])
    ends = [token for token in range(model.n_vocab) if model.is_eog(token)]
    end = max(float(rows[0][token]) for token in ends)
    return abs(float(rows[0][longer[position]]) - end), _noise(rows)


def _rows(model: Model, tokens: Sequence[int]) -> list[np.ndarray]:
    """The last position's logits, decoded alone and as the last of 2 to 8 tokens."""
    rows = []
    for width in range(1, 9):
        # as in a generation: everything before is decoded in one go, the rest at this width
        model.clear()
        model.decode(tokens[:-width])
        model.decode(tokens[-width:], n_outputs=width)
        rows.append(model.logits(width - 1))
    return rows


def _noise(rows: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(row - rows[0]).max()) for row in rows[1:])
