"""Speculative sampling: draft tokens are sampled, and the text has exactly the target's
distribution.

Let p be the target's distribution after some tokens, and q the draft's.  The rule for one child x
that is sampled from q (Leviathan et al. 2023, §2.3; Chen et al. 2023, algorithm 2):

    accept x with probability min(1, p(x) / q(x)), else draw from p' = norm(max(p - q, 0))

    P(y) = q(y) min(1, p(y) / q(y)) + (1 - sum_x min(p(x), q(x))) p'(y)
         = min(p(y), q(y)) + max(p(y) - q(y), 0) = p(y)

For several children x_1 .. x_k, sampled from q one after another without replacement, the rule is
applied again after each rejection.  After the rejection of x_i, the token must have the
distribution p', and x_{i+1} was sampled from q' = q without x_i.  p' does not depend on x_i, so by
induction the token has the distribution p (SpecInfer, Miao et al. 2024, algorithm 2; without
replacement: Yang et al. 2024, "multi-candidate speculative decoding"; Jeon et al. 2024, "recursive
rejection sampling").

In a tree, the rule is applied at each node of the accepted path.  The number of a node's children
may depend on q, but never on the tokens that were sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swift_gguf.errors import SamplingError


@dataclass(frozen=True, eq=False)
class Distribution:
    """Probabilities of some token ids.  All other tokens have probability 0.

    Raises:
        SamplingError: the ids do not ascend, or the probabilities do not sum to 1.
    """

    ids: NDArray[np.int32]
    """[n], ascending."""
    p: NDArray[np.float64]
    """[n]"""

    def __post_init__(self) -> None:
        if self.ids.shape != self.p.shape or (self.ids[1:] <= self.ids[:-1]).any():
            raise SamplingError(
                "a distribution needs ascending token ids with one probability each"
            )
        # written so that NaN is refused, too
        if not (self.p.min(initial=0) >= 0 and abs(self.p.sum() - 1) < 1e-9):
            raise SamplingError("probabilities must not be negative and must sum to 1")

    @classmethod
    def softmax(cls, ids: NDArray[np.int32], logits: NDArray[np.float32]) -> Distribution:
        """The softmax of logits [n] of different token ids [n] in any order.

        A logit of -inf excludes its token.

        Raises:
            SamplingError: no token is left, or a logit is not a number.
        """
        top = logits.max(initial=-np.inf)
        if not np.isfinite(top):
            raise SamplingError(
                "there is no token to draw: the grammar allows none here, or the logits are not "
                "finite; check the grammar, the temperature and the model file"
            )
        order = np.argsort(ids, kind="stable")  # linear if they ascend already
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
        """The distribution given that the token is not this one; None if no other is possible."""
        return _normalised(self.ids, np.where(self.ids == token, 0.0, self.p))


def _normalised(ids: NDArray[np.int32], weights: NDArray[np.float64]) -> Distribution | None:
    """The distribution proportional to `weights`; None if all weights are 0."""
    kept = weights > 0
    ids, weights = ids[kept], weights[kept]
    return Distribution(ids, weights / weights.sum()) if len(ids) else None


def draw(distribution: Distribution, rng: np.random.Generator) -> int:
    """Samples a token by inverting the cumulative distribution.  Takes one random number."""
    cumulative = np.cumsum(distribution.p)
    # "right", so that a token with probability 0 is never sampled
    place = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(distribution.ids[place])


def draw_children(q: Distribution, k: int, rng: np.random.Generator) -> list[int]:
    """Samples at most k different tokens, one after another without replacement.

    There are fewer if q has fewer tokens.  Takes one random number for each child.
    """
    children: list[int] = []
    rest: Distribution | None = q
    while rest is not None and len(children) < k:
        children.append(draw(rest, rng))
        rest = rest.without(children[-1])
    return children


@dataclass(frozen=True, eq=False)
class Round:
    """The rule for one child, given that the children before it were rejected."""

    child: int
    acceptance: float
    """The probability of acceptance."""
    residual: Distribution | None
    """The distribution of the token if the child is rejected; None: it is always accepted."""


def rounds(p: Distribution, q: Distribution | None, children: Sequence[int]) -> Iterator[Round]:
    """Yields the rounds in order, up to the first child that is always accepted.

    A child may look less probable under p than under q although p - q is positive nowhere.  Then
    both are equal up to rounding, because they sum to 1.  The acceptance is taken as 1, because
    there is no token to sample after a rejection.

    Raises:
        SamplingError: a child cannot have been sampled from q at its place.
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
    """norm(max(p - q, 0)); None if p exceeds q nowhere."""
    return _normalised(p.ids, np.maximum(p.p - q.of_all(p.ids), 0.0))


def choose(
    p: Distribution, q: Distribution | None, children: Sequence[int], rng: np.random.Generator
) -> int:
    """Samples a token with the distribution p, if `children` came from `draw_children(q, ...)`.

    The token is one of the children as often as the rule allows.  Without children it is sampled
    from p, and q is not needed.  Takes one random number for each child up to the accepted one, and
    one more if none is accepted.
    """
    for verdict in rounds(p, q, children):
        if verdict.residual is None or rng.random() < verdict.acceptance:
            return verdict.child
        p = verdict.residual
    return draw(p, rng)
