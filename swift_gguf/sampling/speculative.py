"""Speculative sampling: drafts are drawn too, and what is emitted follows the target's law exactly.

Let p be the target's distribution after some tokens and q the draft's.  One child x drawn from q
(Leviathan et al. 2023, §2.3; Chen et al. 2023, algorithm 2):

    accept x with probability min(1, p(x) / q(x)), else draw from p' = norm(max(p - q, 0))

    P(y) = q(y) min(1, p(y) / q(y)) + (1 - sum_x min(p(x), q(x))) p'(y)
         = min(p(y), q(y)) + max(p(y) - q(y), 0) = p(y)

Several children x_1 .. x_k, drawn from q one after another without replacement, are the same rule
applied to itself: after the rejection of x_i the token must follow p', and x_{i+1} was drawn from
q' = q given that it is not x_i.  p' does not depend on x_i, so by induction the law is p again
(SpecInfer, Miao et al. 2024, algorithm 2; without replacement: Yang et al. 2024, "multi-candidate
speculative decoding"; Jeon et al. 2024, "recursive rejection sampling").

A tree applies the rule at each node of the accepted path.  How many children a node has may depend
on q, never on which tokens were drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swift_gguf.errors import SamplingError


@dataclass(frozen=True, eq=False)
class Distribution:
    """Probabilities of some token ids; all other tokens have none.

    Raises:
        SamplingError: the ids do not ascend, or the probabilities do not sum to 1.
    """

    ids: NDArray[np.int32]
    """[n], ascending."""
    p: NDArray[np.float64]
    """[n]"""

    def __post_init__(self) -> None:
        if self.ids.shape != self.p.shape or (self.ids[1:] <= self.ids[:-1]).any():
            raise SamplingError("a distribution needs ascending token ids, one a probability")
        # written so that NaN is refused, too
        if not (self.p.min(initial=0) >= 0 and abs(self.p.sum() - 1) < 1e-9):
            raise SamplingError("probabilities must not be negative and must sum to 1")

    @classmethod
    def softmax(cls, ids: NDArray[np.int32], logits: NDArray[np.float32]) -> Distribution:
        """Of distinct ids in any order and their logits, both [n]; -inf excludes a token.

        Raises:
            SamplingError: no token is left, or a logit is not a number.
        """
        top = logits.max(initial=-np.inf)
        if not np.isfinite(top):
            raise SamplingError(
                "there is no token to draw: the grammar allows none here, or the logits are not "
                "finite; check the grammar, the temperature and the model file"
            )
        order = np.argsort(ids, kind="stable")  # linear where they ascend already
        weights = np.exp(logits[order].astype(np.float64) - float(top))
        normalised = _normalised(ids[order], weights)
        assert normalised is not None  # the top's weight is 1
        return normalised

    def of(self, token: int) -> float:
        """The probability of a token."""
        return float(self.of_all(np.array([token], np.int32))[0])

    def of_all(self, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """The probability of each token, both [n]."""
        places = np.minimum(np.searchsorted(self.ids, tokens), len(self.ids) - 1)
        return np.where(self.ids[places] == tokens, self.p[places], 0.0)

    def without(self, token: int) -> Distribution | None:
        """Given that it is not this token; None if it can be no other."""
        return _normalised(self.ids, np.where(self.ids == token, 0.0, self.p))


def _normalised(ids: NDArray[np.int32], weights: NDArray[np.float64]) -> Distribution | None:
    """The distribution proportional to `weights`, or None where there is nothing to scale."""
    kept = weights > 0
    ids, weights = ids[kept], weights[kept]
    return Distribution(ids, weights / weights.sum()) if len(ids) else None


def draw(distribution: Distribution, rng: np.random.Generator) -> int:
    """A token, by inversion of the cumulative distribution; takes one random number."""
    cumulative = np.cumsum(distribution.p)
    # right: a token of no probability spans no number, not even the one it would start at
    place = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(distribution.ids[place])


def draw_children(q: Distribution, k: int, rng: np.random.Generator) -> list[int]:
    """At most k distinct tokens, one after another without replacement, in the order drawn.

    Fewer where q has fewer tokens.  One random number a child.
    """
    children: list[int] = []
    rest: Distribution | None = q
    while rest is not None and len(children) < k:
        children.append(draw(rest, rng))
        rest = rest.without(children[-1])
    return children


@dataclass(frozen=True, eq=False)
class Round:
    """The verdict on one child, given that those before it were rejected."""

    child: int
    acceptance: float
    """Probability."""
    residual: Distribution | None
    """What the token follows if the child is rejected; None: it cannot be."""


def rounds(p: Distribution, q: Distribution | None, children: Sequence[int]) -> Iterator[Round]:
    """The verdicts in order, up to the first child that cannot be rejected.

    Where a child looks less probable under p than under q, but p - q is positive nowhere, both are
    equal up to rounding (they sum to 1): the rule's acceptance is 1 up to rounding, and is taken as
    1, for there is nothing to draw after a rejection.

    Raises:
        SamplingError: a child that q could not have drawn at its place.
    """
    for child in children:
        offered = q.of(child) if q is not None else 0.0
        if q is None or offered == 0:
            raise SamplingError(f"token {child} cannot have been drawn from the draft given")
        wanted = p.of(child)
        residual = _excess(p, q) if wanted < offered else None
        if residual is None:
            yield Round(child, 1.0, None)
            return
        yield Round(child, wanted / offered, residual)
        p, q = residual, q.without(child)


def _excess(p: Distribution, q: Distribution) -> Distribution | None:
    """norm(max(p - q, 0)), or None where p exceeds q nowhere."""
    return _normalised(p.ids, np.maximum(p.p - q.of_all(p.ids), 0.0))


def choose(
    p: Distribution, q: Distribution | None, children: Sequence[int], rng: np.random.Generator
) -> int:
    """A token that follows p, if `children` came from `draw_children(q, ...)`.

    It is one of the children as often as the rule allows.  q: not needed without children, where
    this is a draw from p.  One random number a child up to the accepted one, one more if none is.
    """
    for verdict in rounds(p, q, children):
        if verdict.residual is None or rng.random() < verdict.acceptance:
            return verdict.child
        p = verdict.residual
    return draw(p, rng)
