"""The arithmetic of `prepare`, without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from swift_gguf.errors import SubnetworkError, SwiftError
from swift_gguf.gguf.sidecar import path_beside
from swift_gguf.planning.cost import Costs
from swift_gguf.prepare.low_rank import OPEN
from swift_gguf.prepare.narrowing import Fit, fit
from swift_gguf.prepare.run import PrepareOptions, narrow_width, share_at
from swift_gguf.prepare.statistics import Energy, Normal, NormalEquations, TokenMass, refit
from swift_gguf.prepare.texts import Text, load_texts, save_texts
from swift_gguf.search.space import Space
from swift_gguf.subnetwork import SubNetwork

RNG = np.random.default_rng(0)


def problem(n: int, k: int, n_embd: int, noise: float = 0.0) -> tuple[Normal, np.ndarray]:
    """A linear FFN of k neurons with a bias, and its true columns [k + 1, n_embd]."""
    a = RNG.standard_normal((n, k)).astype(np.float32)
    true = RNG.standard_normal((k + 1, n_embd)).astype(np.float32)
    y = np.hstack([a, np.ones((n, 1), np.float32)]) @ true
    normal = Normal.empty(k, n_embd)
    for part in range(0, n, 37):  # in pieces, as it is streamed
        rows = slice(part, part + 37)
        normal.add(a[rows], (y[rows] + noise * RNG.standard_normal(y[rows].shape)).astype("f4"))
    return normal, true


def test_a_refit_without_a_ridge_finds_the_truth() -> None:
    normal, true = problem(400, 12, 5)
    found = refit(normal, np.zeros((12, 5), np.float32), 1e-6)
    np.testing.assert_allclose(found, true, atol=1e-3)
    assert normal.error(found) == pytest.approx(0.0, abs=1e-4)


def test_a_strong_ridge_keeps_the_original_columns_and_still_finds_the_bias() -> None:
    normal, true = problem(4000, 12, 5)
    found = refit(normal, true[:-1], 1e6)
    np.testing.assert_allclose(found, true, atol=1e-2)


def test_the_error_is_that_of_the_residual() -> None:
    normal, true = problem(500, 6, 4)
    assert normal.error(np.zeros_like(true)) == pytest.approx(1.0)
    assert normal.error(true) == pytest.approx(0.0, abs=1e-4)


def test_normal_equations_keep_held_back_text_apart() -> None:
    kept = {0: np.array([1, 3]), 2: np.array([0])}
    equations = NormalEquations(kept, 4, frozenset({2}))
    x, a, y = (np.ones((3, n), np.float32) for n in (4, 5, 4))
    for layer in (0, 1, 2):  # layer 1 is nobody's
        equations(layer, x, a, y)
    equations.settle(is_held_back=False)
    equations(2, x, 2 * a, y)
    equations(0, x, a, y)
    equations.settle(is_held_back=True)
    np.testing.assert_array_equal(equations.fitted[0].gram, np.full((3, 3), 3.0))
    np.testing.assert_array_equal(equations.judged[2].gram, [[12.0, 6.0], [6.0, 3.0]])
    assert set(equations.judged) == {2}


def test_energy_adds_up_squares() -> None:
    energy = Energy(2)
    for _ in range(2):
        empty = np.zeros((2, 1), np.float32)
        energy(1, empty, np.array([[1.0, 2.0], [3.0, 0.0]], np.float32), empty)
    nobody, squares = energy.squares
    assert nobody is None
    assert squares is not None
    np.testing.assert_allclose(squares, [20.0, 8.0])


def test_token_mass_adds_up_probabilities() -> None:
    mass = TokenMass(4)
    mass.add(np.array([0.0, 0.0, 0.0, -np.inf], np.float32))
    mass.add(np.array([1000.0, 0.0, 0.0, 0.0], np.float32))
    np.testing.assert_allclose(mass.mass, [4 / 3, 1 / 3, 1 / 3, 0.0])


@settings(deadline=None)
@given(st.integers(1, 700).map(lambda n: 32 * n), st.floats(0.01, 1.0))
def test_widths_are_whole_blocks(n_ff: int, share: float) -> None:
    width = narrow_width(n_ff, share)
    assert 0 < width <= n_ff
    assert width % 32 == 0
    assert narrow_width(n_ff, 1.0) == n_ff


def test_late_layers_are_wider_and_a_whole_width_is_whole() -> None:
    shares = [share_at(layer, 28, 0.25) for layer in range(28)]
    assert shares == sorted(shares)
    assert shares[0] < 0.25 < shares[-1]
    assert np.mean(shares) == pytest.approx(0.25, rel=0.1)
    assert {share_at(layer, 28, 1.0) for layer in range(28)} == {1.0}


@pytest.mark.parametrize(
    "options", [{"width": 0.0}, {"width": 1.5}, {"n_head": -1}, {"kind": "IQ2_XXS"}]
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(SwiftError):
        PrepareOptions(**options)  # type: ignore[arg-type]


def test_texts_survive_and_damaged_or_foreign_ones_do_not(tmp_path: Path) -> None:
    path, texts = tmp_path / "t.json", [Text(prompt=[1, 2], answers=[[3], [4, 5]])]
    assert load_texts(path, "key") == []
    save_texts(path, "key", texts)
    assert load_texts(path, "key") == texts
    assert load_texts(path, "another") == []
    path.write_text(path.read_text()[:-5])
    assert load_texts(path, "key") == []


def test_the_sidecars_name() -> None:
    assert path_beside(Path("/a/b.Q4_0.gguf")) == Path("/a/b.Q4_0.swift.gguf")


# -- sub-networks with narrow FFNs -----------------------------------------------------------------


def test_an_ffn_is_left_out_or_narrow_not_both() -> None:
    with pytest.raises(SubnetworkError, match="both"):
        SubNetwork(n_layer=4, skip_ffn=frozenset({1}), narrow_ffn=frozenset({1, 2}))
    network = SubNetwork(n_layer=3, skip_ffn=frozenset({0}), narrow_ffn=frozenset({2}))
    assert network.ffn_shares == [0.0, 1.0, 0.5]
    assert "narrow FFN 2" in str(network)
    assert not network.is_whole


def test_a_narrow_space_narrows_instead_of_leaving_out() -> None:
    space = Space(6, [0, 1, 2, 3, 4, 5], [0, 2, 5], is_narrow=True, has_head=True)
    assert space.attn == (1, 2, 3, 4)
    assert space.ffn == (0, 2, 5)
    bold = space.every(ffn=1)
    assert bold.narrow_ffn == {0, 2, 5}
    assert not bold.skip_ffn
    assert bold.draft_head
    assert bold in space
    np.testing.assert_array_equal(space.mask(space.subnetwork(space.mask(bold))), space.mask(bold))
    assert SubNetwork(n_layer=6, narrow_ffn=frozenset({0})) not in space  # without the head
    assert SubNetwork(n_layer=6, skip_ffn=frozenset({2})) not in space


def test_narrow_passes_have_a_price() -> None:
    costs = Costs(
        pass_ms=((1, 20.0),),
        attention_ms=(1.0, 1.0),
        ffn_ms=(6.0, 6.0),
        kv_ms=(0.0, 0.0),
        head_ms=5.0,
        n_kv=1,
        narrow_ms=(4.0, 3.0),
        draft_head_ms=2.5,
    )
    both = SubNetwork(n_layer=2, narrow_ffn=frozenset({0, 1}), draft_head=True)
    assert costs.draft_ms(both) == pytest.approx(20.0 - 7.0 - 2.5)
    assert Costs.from_dict(costs.as_dict()) == costs


# -- the linear path -------------------------------------------------------------------------------


Floats = NDArray[np.float32]
Planted = tuple[Normal, Floats, tuple[Floats, Floats, Floats]]


def planted(n: int = 3000, k: int = 8, d: int = 20, n_embd: int = 16, rank: int = 3) -> Planted:
    """Outputs of k known neurons and of a linear map of low rank: what both together explain."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((n, d)).astype(np.float32)
    a = np.maximum(x @ rng.standard_normal((d, k)), 0).astype(np.float32)
    columns = rng.standard_normal((k, n_embd)).astype(np.float32)
    low = (rng.standard_normal((d, rank)) @ rng.standard_normal((rank, n_embd))).astype(np.float32)
    y = a @ columns + x @ low + np.float32(0.5)
    problem = Normal.empty(k + d, n_embd)
    problem.add(np.hstack([a, x]), y)
    return problem, columns, (x, a, y)


def test_a_path_of_the_right_rank_explains_what_neurons_cannot() -> None:
    problem, columns, (x, a, y) = planted()
    errors = [fit(problem, columns, 1e-6, rank=rank).error(problem) for rank in (0, 2, 3)]
    assert errors[2] == pytest.approx(0.0, abs=1e-4)
    assert errors[0] > errors[1] > 0.01
    found = fit(problem, columns, 1e-6, rank=3)
    path = x @ found.rows.T
    np.testing.assert_allclose((path**2).mean(0), 1.0, rtol=0.05)  # of unit power
    whole = np.hstack([a, path, np.ones((len(a), 1))]) @ found.columns
    np.testing.assert_allclose(whole, y, atol=0.02 * np.abs(y).max())


def test_columns_are_fitted_to_the_rows_that_are_stored() -> None:
    problem, columns, _ = planted()
    coarse = fit(problem, columns, 1e-6, rank=3, stored=lambda rows: np.round(rows, 1))
    blind = fit(problem, columns, 1e-6, rank=3)
    as_read = Fit(coarse.rows, blind.columns)
    assert coarse.error(problem) < as_read.error(problem)


def test_an_open_gate_passes_its_neuron_on() -> None:
    up = np.linspace(-3, 3, 50, dtype=np.float32)
    silu = OPEN / (1 + np.exp(-OPEN)) * up
    np.testing.assert_allclose(silu / OPEN, up, rtol=1e-6)
