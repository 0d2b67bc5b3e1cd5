"""Who holds which cells, on a model of llama.cpp's cache: a batch takes the first free ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from swift_gguf.errors import DecodeError
from swift_gguf.model.cells import N_SEQUENCES, PARKED, TRUNK, Cells

CAPACITY = 96


@dataclass
class Cache:
    """What llama_kv_cache keeps of its cells: a position and the sequences that hold it."""

    cells: list[tuple[int, set[int]] | None] = field(default_factory=lambda: [None] * CAPACITY)
    loads_left: float = float("inf")
    """After so many, loading a state fails."""

    def llama_get_memory(self, ctx: Any) -> Any:
        return ctx

    def llama_memory_seq_rm(self, _: Any, sequence: int, start: int, end: int) -> bool:
        for i, cell in enumerate(self.cells):
            if cell and start <= cell[0] and (end < 0 or cell[0] < end):
                cell[1].discard(sequence)
                if not cell[1]:
                    self.cells[i] = None
        return True

    def llama_memory_seq_cp(self, _: Any, source: int, target: int, start: int, end: int) -> None:
        for cell in self.cells:
            if cell and start <= cell[0] < end and source in cell[1]:
                cell[1].add(target)

    def llama_memory_seq_pos_max(self, _: Any, sequence: int) -> int:
        return max(self.held(sequence), default=-1)

    def llama_memory_clear(self, _: Any, data: bool) -> None:
        self.cells = [None] * CAPACITY

    def llama_state_seq_get_size(self, _: Any, sequence: int) -> int:
        return len(self.held(sequence))

    def llama_state_seq_get_data(self, _: Any, data: Any, size: int, sequence: int) -> int:
        data[:] = self.held(sequence)
        return size

    def llama_state_seq_set_data(self, _: Any, data: Any, size: int, sequence: int) -> int:
        assert not self.held(sequence)
        self.loads_left -= 1
        if self.loads_left < 0:
            return 0
        for pos in data:
            self.cells[self.cells.index(None)] = (pos, {sequence})
        return size

    def decode(self, positions: Sequence[int], sequences: Sequence[Sequence[int]]) -> None:
        """One batch; llama.cpp's checks of positions are made here, too."""
        for sequence in {s for held in sequences for s in held}:
            first = min(p for p, held in zip(positions, sequences, strict=True) if sequence in held)
            assert first == len(self.held(sequence)), "positions must go on where they ended"
        for pos, held in zip(positions, sequences, strict=True):
            self.cells[self.cells.index(None)] = (pos, set(held))

    def held(self, sequence: int) -> list[int]:
        """Positions that a sequence holds, in the order of the cells."""
        return [cell[0] for cell in self.cells if cell and sequence in cell[1]]


def append(cells: Cells, cache: Cache, n: int) -> None:
    cache.decode(range(cells.n_trunk, cells.n_trunk + n), [[TRUNK]] * n)
    cells.n_trunk += n


def grow(cells: Cells, cache: Cache, rng: random.Random, n: int, *, one_by_one: bool) -> None:
    parents = [-1, *(rng.randint(-1, node - 1) for node in range(1, n))]
    groups = [[parent] for parent in parents] if one_by_one else [parents]
    for group in groups:
        nodes = cells.place([7] * len(group), group)
        cache.decode([node.pos for node in nodes], [node.sequences for node in nodes])


def some_path(cells: Cells, rng: random.Random) -> list[int]:
    node, path = rng.randrange(len(cells.nodes)), []
    while node >= 0:
        path.append(node)
        node = cells.nodes[node].parent
    return path[::-1]


@pytest.mark.parametrize("seed", range(60))
def test_the_trunk_stays_in_order_and_every_cell_is_accounted_for(seed: int) -> None:
    rng, cache = random.Random(seed), Cache()
    cells = Cells(cache, None, capacity=CAPACITY, n_sequences=N_SEQUENCES)
    append(cells, cache, 3)
    for _ in range(120):
        room, act = cells.free, rng.random()
        if act < 0.15:
            cells.rollback(rng.randint(1, cells.n_trunk))
        elif act < 0.3 and room > 0:
            append(cells, cache, rng.randint(1, min(room, 4)))
        elif act < 0.33:
            cells.close_gaps()
            assert cells.n_parked == 0
            assert [cell and cell[0] for cell in cache.cells[: cells.n_trunk]] == list(
                range(cells.n_trunk)
            )
        elif act < 0.45 and room > 4 and cells.n_trunk > 4:
            start = rng.randint(0, cells.n_trunk - 4)
            branches = cells.window(start, 4)
            cache.decode(range(start, start + 4), [[branch] for branch in branches])
            assert all(len(cache.held(b)) == start + i + 1 for i, b in enumerate(branches))
            cells.close_window()
        elif room > 0:
            grow(cells, cache, rng, rng.randint(1, min(room, 7)), one_by_one=act < 0.7)
            if act < 0.55:
                cells.rollback(cells.n_trunk)
            else:
                cells.keep(some_path(cells, rng))
        else:
            cells.rollback(cells.n_trunk // 2)
        assert cache.held(TRUNK) == list(range(cells.n_trunk)), "out of order"
        assert all(len(cache.held(sequence)) == cells.n_parked for sequence in PARKED)
        assert cache.cells.count(None) == cells.free
        assert not cells.nodes
    cells.rollback(0)
    assert cells.free == CAPACITY


@pytest.mark.parametrize("n_moved", range(4))
def test_closing_gaps_that_fails_leaves_a_shorter_trunk(n_moved: int) -> None:
    cache = Cache()
    cells = Cells(cache, None, capacity=CAPACITY, n_sequences=N_SEQUENCES, n_swa=8)
    append(cells, cache, 6)
    cells.place([1, 2, 3], [-1, -1, -1])
    cache.decode([node.pos for node in cells.nodes], [node.sequences for node in cells.nodes])
    cells.keep([2])
    append(cells, cache, 20)  # moved in parts that end at 8, 16, 24 and 27
    cache.loads_left = n_moved
    with pytest.raises(DecodeError, match="restore cells"):
        cells.close_gaps()
    cells.mend()
    assert cells.n_trunk == [6, 8, 16, 24][n_moved]
    assert cache.held(TRUNK) == list(range(cells.n_trunk))
    assert cells.free == cache.cells.count(None) == CAPACITY - cells.n_trunk


@pytest.mark.parametrize("seed", range(10))
def test_states_hold_the_trunk_alone_and_come_back_without_gaps(seed: int) -> None:
    rng, cache = random.Random(seed), Cache()
    cells = Cells(cache, None, capacity=CAPACITY, n_sequences=N_SEQUENCES, n_swa=8)
    append(cells, cache, 3)
    for _ in range(8):
        grow(cells, cache, rng, 4, one_by_one=False)
        cells.keep(some_path(cells, rng))
    before, n = [cell and (cell[0], set(cell[1])) for cell in cache.cells], cells.n_trunk - 2
    states = list(cells.states(n))
    assert [pos for _, state in states for pos in state] == list(range(n))
    assert [end for end, _ in states] == [*range(8, n, 8), n]
    assert cells.certain is None
    assert [cell and cell[0] for cell in cache.cells] == [cell and cell[0] for cell in before]
    cells.clear()
    for end, state in states:
        cells.put(state, end)
        assert cells.n_trunk == end
    assert [cell and cell[0] for cell in cache.cells[:n]] == list(range(n))
    assert cache.held(TRUNK) == list(range(n))
    assert all(len(cell[1]) == 2 for cell in cache.cells if cell), "not protected by a holder"
    assert cells.free == CAPACITY - n


def test_a_state_that_is_refused_leaves_what_came_before() -> None:
    cache = Cache()
    cells = Cells(cache, None, capacity=CAPACITY, n_sequences=N_SEQUENCES, n_swa=8)
    append(cells, cache, 20)
    states = list(cells.states(20))
    cells.clear()
    cache.loads_left = 1
    cells.put(states[0][1], states[0][0])
    with pytest.raises(DecodeError, match="restore cells"):
        cells.put(states[1][1], states[1][0])
    cells.mend()
    assert cells.n_trunk == 8
    assert cache.held(TRUNK) == list(range(8))


def test_an_empty_cache_is_certain() -> None:
    """Also after a change that failed: mending must not bring its length back."""
    cache = Cache()
    cells = Cells(cache, None, capacity=CAPACITY, n_sequences=N_SEQUENCES)
    append(cells, cache, 5)
    with pytest.raises(RuntimeError), cells._changing(3):
        raise RuntimeError
    cells.clear()
    cells.mend()
    assert cells.n_trunk == 0


def test_an_uncertain_branch_is_emptied() -> None:
    cache = Cache()
    cells = Cells(cache, None, capacity=CAPACITY, n_sequences=N_SEQUENCES)
    append(cells, cache, 5)
    cells.place([1, 2, 3], [-1, -1, -1])
    cells.forget_branches()
    cells.rollback(5)
    assert cache.held(TRUNK) == list(range(5))
    assert [cell[1] for cell in cache.cells if cell] == [{TRUNK}] * 5


def test_too_many_branches() -> None:
    cache = Cache()
    cells = Cells(cache, None, capacity=CAPACITY, n_sequences=4)
    append(cells, cache, 1)
    with pytest.raises(ValueError, match="branches"):
        cells.place([1, 2, 3, 4], [-1] * 4)
