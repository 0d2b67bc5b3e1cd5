"""From what the user asked for to a drafter, or to the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass

from swift_gguf.drafting import Drafter, LayerSkip
from swift_gguf.errors import SubnetworkError, UnsupportedModelError
from swift_gguf.model import Model, Sublayer
from swift_gguf.subnetwork import SubNetwork, format_layers

_WHY_NOT = {
    "absent": "the model has none there",
    "unshared": "this architecture builds it in its own way",
    "useless": "that would save nothing",
}


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """A drafter and the reason for it, or None and the reason why not."""

    drafter: Drafter | None
    why: str


def choose(
    model: Model,
    *,
    mode: str = "auto",
    skip_attn: frozenset[int] | None = None,
    skip_ffn: frozenset[int] | None = None,
    p_min: float = 0.8,
) -> Speculation:
    """What drafts for this model.

    mode: ``off``, ``layer-skip``, or ``auto`` (layer-skip wherever the model allows it).
    skip_attn, skip_ffn: a sub-network of the user's own; both None: the uniform start.

    Raises:
        UnsupportedModelError: layer-skip is asked for by name, and the model cannot be rolled back.
        SubnetworkError: a named sub-layer does not exist or cannot be skipped.
    """
    if mode == "off":
        return Speculation(drafter=None, why="switched off")
    if refusal := model.rollback_refusal:
        if mode == "layer-skip" or skip_attn or skip_ffn:
            raise UnsupportedModelError(f"no speculation: {refusal}; use --speculation off")
        return Speculation(drafter=None, why=refusal)

    attention, ffn = model.sublayers
    if skip_attn is None and skip_ffn is None:
        start = SubNetwork.uniform(model.n_layer)
        subnetwork = SubNetwork(
            n_layer=model.n_layer,
            skip_attn=frozenset(i for i in start.skip_attn if attention[i].status == "ok"),
            skip_ffn=frozenset(i for i in start.skip_ffn if ffn[i].status == "ok"),
        )
        why = "uniform start"
    else:
        subnetwork = SubNetwork(
            n_layer=model.n_layer,
            skip_attn=skip_attn or frozenset(),
            skip_ffn=skip_ffn or frozenset(),
        )
        _refuse_unskippable("attention", subnetwork.skip_attn, attention)
        _refuse_unskippable("FFN", subnetwork.skip_ffn, ffn)
        why = "as given"
    if not subnetwork.skip_attn and not subnetwork.skip_ffn:
        return Speculation(drafter=None, why="nothing to skip: a draft would cost a full pass")
    return Speculation(
        drafter=LayerSkip(model, subnetwork, p_min=p_min), why=f"{why}: {subnetwork}"
    )


def _refuse_unskippable(kind: str, layers: frozenset[int], sublayers: list[Sublayer]) -> None:
    for status, reason in _WHY_NOT.items():
        if wrong := [layer for layer in sorted(layers) if sublayers[layer].status == status]:
            raise SubnetworkError(f"cannot skip {kind} {format_layers(wrong)}: {reason}")
