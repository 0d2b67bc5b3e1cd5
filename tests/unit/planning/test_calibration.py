"""When drafts stop, and how often what a source offers is accepted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_gguf.drafting.policy import Threshold
from swift_gguf.drafting.tree import ROOT, Offer, Tree
from swift_gguf.planning.calibration import BANDS, RANKS, Calibration, Prior

PROBABILITY = st.floats(0, 1)


# -- the fixed threshold ---------------------------------------------------------------------------


@given(PROBABILITY, PROBABILITY, PROBABILITY)
def test_a_threshold_looks_at_the_draft_s_own_probability(p_min: float, p: float, j: float) -> None:
    rule = Threshold(p_min)
    assert rule.joint(j, Offer(1, p)) == j * p
    assert rule.extends(p, j) == (p >= p_min)
    assert rule.includes(p, j) == (p >= p_min or j == 1.0)


def test_a_tree_s_threshold_verifies_likely_paths_too() -> None:
    rule = Threshold(0.5, joint_min=0.1)
    assert [rule.includes(0.2, j) for j in (0.2, 0.1, 0.09)] == [True, True, False]
    assert rule.includes(0.5, 0.01)
    assert not rule.extends(0.2, 0.2)


# -- measured acceptance ---------------------------------------------------------------------------


def believing(weight: float, *, memory: float = 1e12) -> Calibration:
    """As if so many tokens of every band had been accepted."""
    return Calibration({"": Prior((1.0,) * len(BANDS), weight)}, memory=memory)


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
    calibration, rng = Calibration(memory=12000.0), np.random.default_rng(0)
    for _ in range(1000):
        for probability, share in planted.items():
            tell(calibration, probability, bool(rng.random() < share))
    for probability, share in planted.items():
        # an average over a memory's share of 500 tokens: four of its standard errors
        error = math.sqrt(share * (1 - share) / 2 / 500)
        assert calibration.acceptance(probability) == pytest.approx(share, abs=4 * error + 0.01)


def test_bands_begin_at_their_lower_ends() -> None:
    for low, high in zip(BANDS, (*BANDS[1:], 1.1), strict=True):
        calibration = believing(1e-9, memory=400.0)
        tell(calibration, low, accepted=False)
        for probability in (low, math.nextafter(high, 0)):
            assert calibration.acceptance(probability) == pytest.approx(0.0, abs=1e-6)
        # next door nothing was seen
        assert high > 1 or calibration.acceptance(high) == 1.0
        assert low == 0 or calibration.acceptance(math.nextafter(low, 0)) == 1.0


def test_the_prior_is_worth_that_many_accepted_tokens() -> None:
    calibration = believing(6.0)
    tell(calibration, 0.85, accepted=False, times=3)
    tell(calibration, 0.85, accepted=True)
    assert calibration.acceptance(0.85) == pytest.approx((1 + 6) / (4 + 6))


def test_evidence_fades_with_the_tokens_generated() -> None:
    """Drafted or not: what was given up is tried again."""
    calibration = believing(4.0, memory=400.0)
    calibration.judge([Offer(1, 0.85)], 2)
    calibration.passed(300)
    tell(calibration, 0.15, accepted=True, times=50)  # two tokens each, with the bonus
    left = math.exp(-1)
    assert calibration.acceptance(0.85) == pytest.approx(4 / (left + 4), rel=1e-3)


def test_a_change_is_learned_within_some_memories() -> None:
    calibration, rng = Calibration(memory=800.0), np.random.default_rng(1)
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
    tree = Tree()
    for node, (parent, low) in enumerate(zip(parents, bands, strict=True)):
        tree.add(parent, Offer(node, low + 0.05), 1.0)
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
    calibration = believing(prior)
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


# -- of several sources ----------------------------------------------------------------------------

LOW = Prior(tuple(0.5 * low for low in BANDS), weight=8.0)


def test_sources_are_known_apart() -> None:
    calibration = Calibration({"modest": LOW}, memory=1e12)
    assert calibration.acceptance(0.85, "modest") == 0.4
    calibration.judge([Offer(1, 0.85, "modest"), Offer(2, 0.85, "other")], 2)
    assert calibration.acceptance(0.85, "modest") == pytest.approx(0.4 * 8 / 9)
    calibration.judge([Offer(1, 0.85, "other")], 2)
    assert calibration.acceptance(0.85, "other") == pytest.approx((1 + 2) / (2 + 2))
    assert calibration.acceptance(0.85, "modest") == pytest.approx(0.4 * 8 / 9)


def test_the_offers_of_a_pass_are_known_by_their_order() -> None:
    calibration = Calibration({"a": LOW, "b": LOW}, memory=1e12)
    believed = sum(LOW.acceptance) / len(BANDS)
    assert calibration.acceptance_by_rank("a") == pytest.approx([believed, *[0.0] * (RANKS - 1)])
    for token in (1, 1, 2, 3):  # a's likeliest is right twice, its second likeliest once
        offers = [Offer(1, 0.9, "a"), Offer(4, 0.3, "b"), Offer(2, 0.15, "a", rank=1)]
        calibration.judge(offers, token)
    first, second, *others = calibration.acceptance_by_rank("a")
    assert first == pytest.approx((2 + 8 * believed) / (4 + 8))
    assert second == pytest.approx(1 / (4 + 8))
    assert others == [0.0] * (RANKS - 2)
    assert calibration.acceptance_by_rank("b")[0] == pytest.approx(8 * believed / (4 + 8))
    assert calibration.acceptance(0.15, "a", rank=1) == pytest.approx((1 + 8 * 0.1) / (4 + 8))
    assert calibration.acceptance(0.15, "a") == LOW.acceptance[1]


def test_a_lookup_s_offers_are_told_apart_by_confidence_alone() -> None:
    calibration = Calibration({"a": LOW}, memory=1e12)
    calibration.judge([Offer(1, 0.15, "a"), Offer(2, 0.15, "a")], 2)
    assert calibration.acceptance(0.15, "a") == pytest.approx((1 + 8 * LOW.acceptance[1]) / 10)
    believed = sum(LOW.acceptance) / len(BANDS)
    assert calibration.acceptance_by_rank("a")[0] == pytest.approx(8 * believed / 9)


def test_nothing_offered_teaches_nothing() -> None:
    calibration = Calibration({"a": LOW})
    calibration.judge([], 1)
    assert [calibration.acceptance(p, "a") for p in BANDS] == pytest.approx(LOW.acceptance)


def test_a_recalled_past_counts_as_a_seen_one() -> None:
    recalled, seen = Calibration(memory=1e12), Calibration(memory=1e12)
    agrees, confidence = [True, False, True, True], [0.55, 0.55, 0.92, 0.2]
    recalled.recall("a", agrees, np.array(confidence, dtype=np.float32))
    for is_right, probability in zip(agrees, confidence, strict=True):
        seen.judge([Offer(3, probability, "a")], 3 if is_right else 4)
    for probability in BANDS:
        assert recalled.acceptance(probability, "a") == seen.acceptance(probability, "a")
    assert recalled.acceptance_by_rank("a") == seen.acceptance_by_rank("a")
    assert recalled.acceptance_by_rank("a")[0] < 1.0


def test_what_was_forgotten_is_believed_as_in_the_beginning() -> None:
    calibration = Calibration({"a": LOW})
    calibration.judge([Offer(1, 0.85, "a"), Offer(1, 0.85, "b")], 2)
    calibration.forget("a")
    calibration.forget("never heard of")
    assert calibration.acceptance(0.85, "a") == 0.4
    assert calibration.acceptance(0.85, "b") < 1.0
