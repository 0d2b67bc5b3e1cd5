"""Trees in the KV cache: every node sees its own path, and kept paths are as if decoded plainly."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from swift_gguf.errors import ContextFullError, StoppedError
from swift_gguf.model.cells import Cells
from swift_gguf.model.model import Model
from swift_gguf.subnetwork import SubNetwork
from tests.unit.fake_model import shapes

PROMPT = list(range(5, 25))
INVARIANT = "Q8_0"  # kernels that round the same at every width


def plain_logits(model: Model, tokens: Sequence[int]) -> np.ndarray:
    """After each token, decoded one by one; the model is left empty."""
    model.clear()
    rows = []
    for token in tokens:
        model.decode([token])
        rows.append(model.logits(0))
    model.clear()
    return np.array(rows)


@pytest.fixture
def two(tiny: Callable[..., Path], open_model: Callable[..., Model]) -> Callable[..., list[Model]]:
    """The same model twice: one for trees, one for plain decoding."""

    def open_two(family: str, **options: object) -> list[Model]:
        path = tiny(family, quant=INVARIANT)
        return [open_model(path, **options) for _ in range(2)]

    return open_two


def start(model: Model, tokens: Sequence[int]) -> None:
    for token in tokens:
        model.decode([token])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_node_sees_its_path(family: str, two: Callable[..., list[Model]]) -> None:
    """All trees of up to 5 nodes, decoded in one pass and node by node: bit for bit."""
    model, plain = two(family)
    start(model, PROMPT)
    start(plain, PROMPT)
    rng = random.Random(1)
    for n in range(1, 6):
        for parents in shapes(n):
            tokens = [rng.randrange(5, model.n_vocab) for _ in range(n)]
            expected = []
            for node in range(n):
                path: list[int] = []
                while node >= 0:
                    path.append(tokens[node])
                    node = parents[node]
                for token in reversed(path):
                    plain.decode([token])
                expected.append(plain.logits(0))
                plain.rollback(len(PROMPT))
            model.decode_tree(tokens, parents)
            for row, logits in enumerate(expected):
                np.testing.assert_array_equal(model.logits(row), logits)
            model.rollback(len(PROMPT))
            for node in range(n):
                model.decode_tree([tokens[node]], [parents[node]])
                np.testing.assert_array_equal(model.logits(0), expected[node])
            model.rollback(len(PROMPT))
    assert model.tokens == PROMPT
    assert model.room == model.n_ctx - len(PROMPT)


def random_tree(rng: random.Random, model: Model) -> tuple[list[int], list[int]]:
    n = rng.randint(1, 9)
    parents = [-1, *(rng.randint(0, node - 1) for node in range(1, n))]
    return [rng.randrange(5, model.n_vocab) for _ in range(n)], parents


def some_path(rng: random.Random, parents: Sequence[int]) -> list[int]:
    node, path = rng.randrange(len(parents)), []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("seed", range(3))
def test_a_text_of_trees_is_a_text(family: str, seed: int, two: Callable[..., list[Model]]) -> None:
    """Random trees, drafts, paths and rollbacks until the context is full, as decoded plainly."""
    model, plain = two(family)
    skipping = SubNetwork(n_layer=model.n_layer, skip_ffn=frozenset([1]), skip_attn=frozenset([1]))
    rng = random.Random(seed)
    start(model, PROMPT)
    start(plain, PROMPT)
    compared = 0
    while model.n_past < model.n_ctx:
        if rng.random() < 0.5 and model.room > 10:  # a draft leaves no trace
            tokens, parents = random_tree(rng, model)
            for token, parent in zip(tokens, parents, strict=True):
                model.decode_tree([token], [parent], subnetwork=skipping)
            model.rollback(model.n_past)
        if rng.random() < 0.1:
            keep = rng.randint(max(1, model.n_past - 12), model.n_past)
            model.rollback(keep)
            plain.rollback(keep)
        tokens, parents = random_tree(rng, model)
        if len(tokens) > max(model.room, 1):
            tokens, parents = tokens[:1], parents[:1]
        model.decode_tree(tokens, parents)
        path = some_path(rng, parents)
        last = model.logits(path[-1])
        model.keep(path)
        for node in path:
            plain.decode([tokens[node]])
        assert model.tokens == plain.tokens
        np.testing.assert_array_equal(last, plain.logits(0))
        compared += 1
    assert compared > 40
    with pytest.raises(ContextFullError):
        model.decode_tree([7], [-1])


def test_gaps_are_parked_and_taken_back(two: Callable[..., list[Model]]) -> None:
    model, _ = two("llama")
    start(model, PROMPT)
    model.decode_tree([5, 6, 7, 8], [-1, 0, 0, 0])
    model.keep([0, 3])  # two cells lie before the last one
    assert model.cells.n_parked == 2
    assert model.room == model.n_ctx - len(PROMPT) - 4
    model.rollback(len(PROMPT) + 1)
    assert model.cells.n_parked == 2  # still before nothing, but freeing them would need a look
    model.rollback(len(PROMPT))
    assert model.cells.n_parked == 0
    assert model.room == model.n_ctx - len(PROMPT)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_window_on_the_targets_past_is_the_text_again(
    family: str, two: Callable[..., list[Model]]
) -> None:
    model, plain = two(family)
    text = [*PROMPT, *range(40, 70)]
    expected = plain_logits(plain, text)
    start(model, text)
    for begin, n, own_past in [(10, 32, False), (0, 8, False), (18, 30, True), (25, 1, False)]:
        model.redecode(begin, n, own_past=own_past)
        rows = np.array([model.logits(row) for row in range(n)])
        np.testing.assert_array_equal(rows, expected[begin : begin + n])
    # under a sub-network, each position stands alone: as a draft of one token after its past
    skipping = SubNetwork(n_layer=model.n_layer, skip_ffn=frozenset([1]), skip_attn=frozenset([2]))
    model.redecode(20, 16, subnetwork=skipping)
    rows = np.array([model.logits(row) for row in range(16)])
    model.redecode(20, 16, subnetwork=skipping, own_past=True)
    other = np.array([model.logits(row) for row in range(16)])
    np.testing.assert_array_equal(rows[0], other[0])
    assert not np.array_equal(rows[1:], other[1:])
    for i in (0, 7, 15):
        plain.clear()
        start(plain, text[: 20 + i])
        plain.decode([text[20 + i]], subnetwork=skipping)
        np.testing.assert_array_equal(plain.logits(0), rows[i])
    assert model.tokens == text
    assert model.room == model.n_ctx - len(text)
    model.decode([99])
    plain.clear()
    start(plain, [*text, 99])
    np.testing.assert_array_equal(model.logits(0), plain.logits(0))


def test_a_stopped_pass_leaves_nothing(two: Callable[..., list[Model]]) -> None:
    model, plain = two("llama")
    text = [*PROMPT, *range(40, 60)]
    start(model, text)
    model.stop.raise_()
    attempts: list[Callable[[], object]] = [
        lambda: model.redecode(8, 16),
        lambda: model.redecode(8, 16, own_past=True),
        lambda: model.decode_tree([5, 6, 7], [-1, 0, 0]),
        lambda: model.decode([5, 6]),
    ]
    for attempt in attempts:
        with pytest.raises(StoppedError):
            attempt()
        assert model.tokens == text
        assert model.room == model.n_ctx - len(text)
    model.stop.lower()
    start(plain, text)
    for m in (model, plain):
        m.decode([99])
    np.testing.assert_array_equal(model.logits(0), plain.logits(0))


def load_again(model: Model) -> None:
    """Saves the state and loads it: llama.cpp looks for free cells from the first on then."""
    text, api = list(model.tokens), model._api
    model.hand_over()
    size = api.llama_state_get_size(model.ctx)
    state = (ctypes.c_uint8 * size)()
    assert api.llama_state_get_data(model.ctx, state, size) == size
    assert api.llama_state_set_data(model.ctx, state, size) == size
    model.assume(text)


@pytest.mark.parametrize("after_error", [False, True])
def test_a_window_after_a_state_was_loaded(
    two: Callable[..., list[Model]], after_error: bool
) -> None:
    """The window's cells are not those behind it that Gemma's own window, of 16, has passed."""
    model, plain = two("gemma3")
    text = [*PROMPT, *range(40, 80)]
    for m in (model, plain):
        start(m, text)
    load_again(model)
    if after_error:  # which forgets who holds what
        with pytest.raises(ContextFullError):
            model.redecode(0, model.n_ctx)
    model.redecode(8, 8)
    for m in (model, plain):
        m.rollback(len(text) - 20)
        m.decode([99])
    np.testing.assert_array_equal(model.logits(0), plain.logits(0))


def test_parked_cells_that_a_sliding_window_has_passed(two: Callable[..., list[Model]]) -> None:
    """A rollback to between parked cells, some far behind the others: none is filled anew."""
    model, plain = two("gemma3")
    deep = list(range(100, 124))  # wrong, and longer than Gemma's window, of 16
    start(model, PROMPT)
    model.decode_tree([5, *deep, 6, 130, 7, 131, 8], [-1, *range(24), 0, 25, 25, 27, 27])
    model.keep([0, 25, 27, 29])
    assert model.tokens == [*PROMPT, 5, 6, 7, 8]
    model.rollback(len(PROMPT) + 2)
    start(plain, [*PROMPT, 5, 6])
    for token in range(40, 60):
        for m in (model, plain):
            m.decode([token])
        np.testing.assert_array_equal(model.logits(0), plain.logits(0))


def test_batches_bound_trees_and_windows(two: Callable[..., list[Model]]) -> None:
    model, plain = two("llama", n_batch=1)
    assert model.room == model.n_batch == 48
    text = [*PROMPT, *range(30, 70)]
    start(model, text)
    attempts: list[Callable[[], object]] = [
        lambda: model.decode_tree([5] * 49, range(-1, 48)),
        lambda: model.redecode(0, 49, own_past=True),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match="batch of 48"):
            attempt()
        assert model.tokens == text
    start(plain, text)
    for m in (model, plain):
        m.decode([99])
    np.testing.assert_array_equal(model.logits(0), plain.logits(0))


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_long_prompt_after_gaps(
    family: str, has_kernels: bool, two: Callable[..., list[Model]]
) -> None:
    """Other kernels of wide batches sum blocks of cells: gaps are closed before."""
    model, plain = two(family, n_ctx=256)
    for m in (model, plain):
        m._at_every_width &= has_kernels
    start(model, range(5, 65))
    model.decode_tree([5, 6, 7, 8], [-1, 0, 0, 0])
    model.keep([0, 3])  # two cells are parked
    start(plain, [*range(5, 65), 5, 8])
    prompt = [9 + i % 90 for i in range(100)]
    for m in (model, plain):
        m.decode(prompt)
    assert model.cells.n_parked == (2 if model._at_every_width else 0)
    np.testing.assert_array_equal(model.logits(0), plain.logits(0))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_full_cache_without_its_gaps(family: str, two: Callable[..., list[Model]]) -> None:
    model, plain = two(family, n_ctx=256)
    start(model, PROMPT)
    model.decode_tree([5, 6, 7, 8], [-1, 0, 0, 0])
    model.keep([0, 3])
    start(plain, [*PROMPT, 5, 8])
    for m in (model, plain):
        start(m, [9 + i % 90 for i in range(256 - m.n_past)])
    assert model.cells.n_parked == 0
    np.testing.assert_array_equal(model.logits(0), plain.logits(0))


def test_an_interrupt_while_gaps_are_closed(
    two: Callable[..., list[Model]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is shorter, and goes on as if it had always been."""
    model, plain = two("gemma3")
    model._at_every_width = False
    start(model, PROMPT)
    model.decode_tree([5, 6, 7, 8], [-1, 0, 0, 0])
    model.keep([0, 3])
    start(model, range(20, 60))
    move = Cells._move

    def interrupted(cells: Cells, begin: int, end: int) -> None:
        if begin > len(PROMPT) + 20:
            raise KeyboardInterrupt
        move(cells, begin, end)

    with monkeypatch.context() as patch:
        patch.setattr(Cells, "_move", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.decode(range(5, 75))
    assert len(PROMPT) + 20 < model.n_past < len(PROMPT) + 40
    start(plain, model.tokens)
    for m in (model, plain):
        m.decode([99])
    np.testing.assert_array_equal(model.logits(0), plain.logits(0))
