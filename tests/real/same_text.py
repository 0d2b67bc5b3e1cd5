"""Decoding one prompt plainly and speculatively, and telling a bug from a near tie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from swift_gguf.bench import ties
from swift_gguf.bench.ties import Divergence
from swift_gguf.drafting import LayerSkip
from swift_gguf.drafting.policy import Threshold
from swift_gguf.engine import generate
from swift_gguf.model.model import Model
from swift_gguf.sampling.sampling import Sampler, SamplingOptions
from swift_gguf.speculation import TREES
from swift_gguf.stats import Stats
from swift_gguf.subnetwork import SubNetwork
from swift_gguf.text.text import encode, render_chat

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


def explain(
    model: Model, prompt: Sequence[int], plain: Sequence[int], other: Sequence[int]
) -> Divergence | None:
    """None if the texts are equal, else the first difference measured on the model itself."""
    return None if list(plain) == list(other) else ties.explain(model, prompt, plain, other)
