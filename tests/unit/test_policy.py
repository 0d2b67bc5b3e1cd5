"""When drafts stop: thresholds, measured acceptance, and what tokens cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_gguf.drafting.policy import BANDS, Adaptive, Calibration, Threshold
from swift_gguf.drafting.tree import ROOT, Offer, Shape, Tree, grow

PROBABILITY = st.floats(0, 1)


# -- the fixed threshold ---------------------------------------------------------------------------


@given(PROBABILITY, PROBABILITY, PROBABILITY)
def test_a_threshold_looks_at_the_draft_s_own_probability(p_min: float, p: float, j: float) -> None:
    rule = Threshold(p_min)
    assert rule.joint(j, p) == j * p
    assert rule.extends(p, j) == (p >= p_min)
    assert rule.includes(p, j) == (p >= p_min or j == 1.0)


def test_a_tree_s_threshold_verifies_likely_paths_too() -> None:
    rule = Threshold(0.5, joint_min=0.1)
    assert [rule.includes(0.2, j) for j in (0.2, 0.1, 0.09)] == [True, True, False]
    assert rule.includes(0.5, 0.01)
    assert not rule.extends(0.2, 0.2)


# -- measured acceptance ---------------------------------------------------------------------------


def tell(calibration: Calibration, probability: float, accepted: bool, times: int = 1) -> None:
    tree = Tree.chain([1], [probability])
    for _ in range(times):
        calibration.observe(tree, [0] if accepted else [])


@given(st.floats(0, 1.0 + 1e-6))
def test_without_evidence_every_draft_is_tried(probability: float) -> None:
    assert Calibration().acceptance(probability) == 1.0


def test_planted_acceptance_is_found_band_by_band() -> None:
    """Overconfident where unsure, too modest where sure."""
    shares = np.linspace(0.02, 0.97, len(BANDS))
    planted = {low + 0.004: share for low, share in zip(BANDS, shares, strict=True)}
    calibration, rng = Calibration(memory=6000.0), np.random.default_rng(0)
    for _ in range(1000):
        for probability, share in planted.items():
            tell(calibration, probability, bool(rng.random() < share))
    for probability, share in planted.items():
        # an average over a memory's share of 500 tokens: four of its standard errors
        error = math.sqrt(share * (1 - share) / 2 / 500)
        assert calibration.acceptance(probability) == pytest.approx(share, abs=4 * error + 0.01)


def test_bands_begin_at_their_lower_ends() -> None:
    for low, high in zip(BANDS, (*BANDS[1:], 1.1), strict=True):
        calibration = Calibration(prior=1e-9)
        tell(calibration, low, accepted=False)
        for probability in (low, math.nextafter(high, 0)):
            assert calibration.acceptance(probability) == pytest.approx(0.0, abs=1e-6)
        # next door nothing was seen
        assert high > 1 or calibration.acceptance(high) == 1.0
        assert low == 0 or calibration.acceptance(math.nextafter(low, 0)) == 1.0


def test_the_prior_is_worth_that_many_accepted_tokens() -> None:
    calibration = Calibration(prior=6.0, memory=1e12)
    tell(calibration, 0.85, accepted=False, times=3)
    tell(calibration, 0.85, accepted=True)
    assert calibration.acceptance(0.85) == pytest.approx((1 + 6) / (4 + 6))


def test_evidence_fades_with_what_is_seen_anywhere() -> None:
    calibration = Calibration(prior=4.0, memory=400.0)
    tell(calibration, 0.85, accepted=False)
    tell(calibration, 0.15, accepted=True, times=400)
    left = math.exp(-1)
    assert calibration.acceptance(0.85) == pytest.approx(4 / (left + 4), rel=1e-3)


def test_a_change_is_learned_within_some_memories() -> None:
    calibration, rng = Calibration(memory=400.0), np.random.default_rng(1)
    for share in (0.9, 0.2, 0.7):
        for _ in range(1600):
            tell(calibration, 0.92, bool(rng.random() < share))
        # of the past exp(-4) is left, of the noise that of 800 tokens
        assert calibration.acceptance(0.92) == pytest.approx(share, abs=0.09)


@st.composite
def judged_trees(draw: st.DrawFn) -> tuple[Tree, list[int]]:
    """A tree with different probabilities, and an accepted path."""
    n = draw(st.integers(1, 8))
    parents = [draw(st.integers(-1, node - 1)) for node in range(n)]
    bands = draw(st.lists(st.sampled_from(BANDS[:8]), min_size=n, max_size=n))
    tree = Tree(list(range(n)), parents, [low + 0.05 for low in bands])
    accepted: list[int] = []
    node = ROOT
    while children := tree.children(node):
        node = draw(st.sampled_from([ROOT, *children]))
        if node == ROOT:
            break
        accepted.append(node)
    return tree, accepted


@settings(deadline=None)
@given(judged_trees())
def test_only_what_the_target_judged_counts(judged: tuple[Tree, list[int]]) -> None:
    """Behind a rejected token nobody knows what would have been accepted."""
    tree, accepted = judged
    prior = 2.0
    calibration = Calibration(prior=prior, memory=1e12)
    calibration.observe(tree, accepted)
    for low in BANDS[:8]:
        probability = low + 0.05
        seen = [
            node in accepted
            for node, parent in enumerate(tree.parents)
            if parent in (ROOT, *accepted) and tree.probabilities[node] == probability
        ]
        expected = (sum(seen) + prior) / (len(seen) + prior)
        assert calibration.acceptance(probability) == pytest.approx(expected)


# -- what a token costs ----------------------------------------------------------------------------


def adaptive(draft: float, verify: float, *, accepted: float = 1.0) -> Adaptive:
    """Where this share of all tokens at 0.92 was accepted."""
    calibration = Calibration(prior=1.0, memory=1e12)
    if accepted < 1:
        tell(calibration, 0.92, accepted=False, times=999)
        tell(calibration, 0.92, accepted=True, times=round(1000 * accepted / (1 - accepted)) - 1)
        assert calibration.acceptance(0.92) == pytest.approx(accepted, abs=1e-3)
    return Adaptive(calibration, draft_share=draft, verify_share=verify)


@given(st.floats(0, 3), st.floats(0, 3), PROBABILITY)
def test_a_token_is_worth_what_it_costs(draft: float, verify: float, joint: float) -> None:
    rule = adaptive(draft, verify)
    if joint >= Adaptive.CEILING:
        assert rule.includes(0.5, joint)
        assert rule.extends(0.5, joint)
    else:
        assert rule.includes(0.5, joint) == (joint >= verify)
        assert rule.extends(0.5, joint) == (joint >= draft + verify)


def test_joint_probabilities_are_measured_ones() -> None:
    calibration = Calibration(prior=1.0, memory=1e12)
    tell(calibration, 0.92, accepted=False, times=9)
    rule = Adaptive(calibration, draft_share=0.3, verify_share=0.1)
    assert rule.joint(0.5, 0.92) == pytest.approx(0.5 * 0.1)
    assert rule.joint(0.5, 0.55) == 0.5


def chain_length(rule: Adaptive) -> int:
    shape = Shape(n_nodes=40)
    return len(grow(lambda tree, node: [Offer(1, 0.92)], rule, shape, is_eog=lambda token: False))


@settings(deadline=None)
@given(st.floats(0.05, 0.9), st.floats(0, 0.3), st.sampled_from([0.5, 0.8, 0.9]))
def test_a_chain_stops_where_its_next_token_costs_too_much(
    draft: float, verify: float, accepted: float
) -> None:
    """The n-th token of a chain saves accepted^n of a plain pass."""
    rule = adaptive(draft, verify, accepted=accepted)
    place, price = (min(share, Adaptive.CEILING) for share in (verify, draft + verify))
    drafted, joint = 0, rule.joint(1.0, 0.92)
    while drafted < 40 and joint >= place:
        drafted += 1
        if joint < price:  # its place pays, a pass to see what comes after it does not
            break
        joint = rule.joint(joint, 0.92)
    assert chain_length(rule) == drafted


def test_cheap_drafts_are_longer() -> None:
    lengths = [chain_length(adaptive(draft, 0.1, accepted=0.9)) for draft in (0.1, 0.3, 0.6)]
    # the last n whose predecessor is likelier than draft and verification cost: 0.9^n >= share
    assert lengths == [16, 9, 4]


def test_the_ceiling_leaves_something_to_learn_from() -> None:
    """A draft dearer than plain decoding still offers what is all but certain."""
    rule = adaptive(2.0, 2.0)
    assert rule.includes(0.5, 0.96)
    assert rule.extends(0.5, 0.96)
    assert not rule.includes(0.5, 0.94)
