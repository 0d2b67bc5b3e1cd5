"""Bookkeeping of the cells in llama.cpp's KV cache.

A cell has the keys and values of one position.  It belongs to any number of sequences.  The text so
far is the *trunk*.  A tree grows from its end.  Each branch of the tree is a sequence that shares
the trunk's cells, so no cell is copied.

Attention sums over cells in their order, and the result of a float sum depends on the order.  A
text decoded with trees must be bit-identical to one decoded plainly, so the trunk's cells must stay
in the order of its positions.  An accepted branch may leave gaps before its cells.  These cells are
*parked*: sequences that are never read hold them.  If they were freed, llama.cpp would fill them
next.  Kernels that sum blocks of cells (tiled and split attention) need a trunk without gaps; see
`close_gaps`.

llama.cpp also reuses cells that are outside a sliding window, if only one sequence holds them.  Its
search for free cells starts at the latest cell.  So it may meet parked cells after a rollback, and
the trunk after a state was loaded.  Two sequences hold these cells, to keep them.

A Ctrl-C may come between a call of llama.cpp and the update of the bookkeeping.  So every change
first notes in `certain` how much of the trunk stays valid.  `mend` keeps that much afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from swift_gguf.errors import DecodeError, UnsupportedModelError
from swift_gguf.native import buffer

TRUNK = 0
PARKED = (1, 2)
HELD = 3
"""A second holder of trunk cells; see `Cells.hold`."""
FIRST_BRANCH = 4
N_SEQUENCES = 48
"""Trunk, holders and branches.  A scoring window of 32 positions fits; each is a sequence."""
MAX_BRANCHES = N_SEQUENCES - FIRST_BRANCH
MOVED = 256
"""Cells that are moved at once at most.  They need twice the memory meanwhile."""


@dataclass(frozen=True)
class Node:
    """A token of the tree and its cell."""

    token: int
    parent: int
    pos: int
    sequences: list[int]
    """The first is its own.  The others are the branches below it that it was decoded with."""


class Cells:
    """The cells of a context that holds one text.

    capacity: the number of cells.
    n_sequences: the number of sequences.
    n_swa: the positions in a sliding window; 0: there is none.
    """

    def __init__(
        self, api: Any, ctx: Any, *, capacity: int, n_sequences: int, n_swa: int = 0
    ) -> None:
        self._api, self._ctx = api, ctx
        self._memory = api.llama_get_memory(ctx)
        self._moved = min(n_swa or MOVED, MOVED)  # a saved state has only the window's cells
        self.capacity = capacity
        self.n_sequences = n_sequences
        self.n_trunk = 0
        self.certain: int | None = None
        """After an interrupted change, the length of the trunk that is valid, until `mend`."""
        self.nodes: list[Node] = []
        self.spoiled = False
        """True if cells hold numbers that are not finite.  They spoil even sums that mask them."""
        self._parked: list[tuple[int, list[int]]] = []  # trunk length before, positions of cells
        self._shared = [0] * n_sequences  # the trunk's length that each branch holds
        self._branches: set[int] = set()  # branches that the tree uses

    @property
    def free(self) -> int:
        """The number of cells that no sequence holds."""
        return self.capacity - self.n_trunk - self.n_parked - len(self.nodes)

    @property
    def n_parked(self) -> int:
        return sum(len(positions) for _, positions in self._parked)

    # -- interrupts --------------------------------------------------------------------------------

    @contextmanager
    def _changing(self, certain: int) -> Iterator[None]:
        """Sets `certain` during a change.  After an error it stays set."""
        before = self.certain
        self.certain = certain if before is None else min(certain, before)
        yield
        self.certain = before

    def mend(self) -> None:
        """After an interrupt, keeps only the valid part of the trunk, without gaps."""
        if self.certain is None:
            return
        certain = self.certain = min([self.certain, *(base for base, _ in self._parked)])
        self._free_parked(0)
        if certain == 0 or not self._remove(TRUNK, certain):
            self.clear()
        else:
            self.n_trunk = certain
            self._parked.clear()
            self._branches.clear()
            self.nodes.clear()
            self.forget_branches()
            self.hold()
        self.certain = None

    # -- the tree ----------------------------------------------------------------------------------

    def place(self, tokens: Sequence[int], parents: Sequence[int]) -> list[Node]:
        """Adds nodes that will be decoded in one batch, in this order.

        parents: for each node the number of an earlier node, which may be in this batch.  -1: the
            end of the trunk.
        """
        first = len(self.nodes)
        with self._changing(self.n_trunk):
            for token, parent in zip(tokens, parents, strict=True):
                has_child = any(node.parent == parent for node in self.nodes)
                pos = self.nodes[parent].pos + 1 if parent >= 0 else self.n_trunk
                own = self.nodes[parent].sequences[0] if parent >= 0 else TRUNK
                self.nodes.append(Node(token, parent, pos, [own]))
                if has_child:
                    self.nodes[-1].sequences[0] = self._branch(parent, first)
        return self.nodes[first:]

    def _branch(self, parent: int, first: int) -> int:
        """A new sequence that holds the trunk and the path to `parent`.

        Nodes from `first` on will be decoded with it.  The nodes before are already decoded.
        """
        branch = self._new_branch()
        self._branches.add(branch)
        self._share(branch, self.n_trunk)
        while parent >= first:
            self.nodes[parent].sequences.append(branch)
            parent = self.nodes[parent].parent
        if parent >= 0:
            end = self.nodes[parent].pos + 1
            self._copy(self.nodes[parent].sequences[0], branch, self.n_trunk, end)
        return branch

    def _new_branch(self) -> int:
        for branch in range(FIRST_BRANCH, self.n_sequences):
            if branch not in self._branches:
                return branch
        raise ValueError(f"the tree has more than {self.n_sequences - FIRST_BRANCH} branches")

    def keep(self, path: Sequence[int]) -> list[int]:
        """Makes the nodes on `path` part of the trunk and drops the others.

        path: nodes from the end of the trunk on.

        Returns the tokens of the path.
        """
        base = self.n_trunk
        with self._changing(base):
            if path:
                self._keep(path, base)
            else:
                self._remove(TRUNK, base)
            tokens = [self.nodes[i].token for i in path]
            self._drop_branches(base)
            self.n_trunk = base + len(path)
        return tokens

    def _keep(self, path: Sequence[int], base: int) -> None:
        last = path[-1]
        if gaps := sorted(set(range(last)) - set(path)):
            self._parked.append((base, [self.nodes[i].pos for i in gaps]))
        for i in gaps:
            node = self.nodes[i]
            for sequence in PARKED:
                self._copy(node.sequences[0], sequence, node.pos, node.pos + 1)
        own, end = self.nodes[last].sequences[0], self.nodes[last].pos + 1
        if own == TRUNK and len(path) < len(self.nodes):
            self._remove(TRUNK, end)
        elif own != TRUNK:
            self._remove(TRUNK, base)
            self._copy(own, TRUNK, base, end)

    def _drop_branches(self, base: int) -> None:
        for branch in self._branches:
            self._remove(branch, base)
        self._branches.clear()
        self.nodes.clear()

    # -- windows -----------------------------------------------------------------------------------

    def window(self, start: int, n: int) -> list[int]:
        """Sequences to decode the trunk positions start, ..., start + n - 1 again.

        Each sequence sees the trunk before its position, and none of the others.  `close_window`
        frees them.
        """
        branches = list(range(FIRST_BRANCH, FIRST_BRANCH + n))
        if branches[-1] >= self.n_sequences or self.nodes:
            raise ValueError(f"a window of {n} positions does not fit, or there is a tree")
        with self._changing(self.n_trunk):
            for i, branch in enumerate(branches):
                self._share(branch, start + i)
                self._branches.add(branch)
        return branches

    def close_window(self) -> None:
        """Removes what was decoded in the window's sequences."""
        with self._changing(self.n_trunk):
            for branch in self._branches:
                self._remove(branch, self._shared[branch])
            self._branches.clear()

    # -- the trunk ---------------------------------------------------------------------------------

    def rollback(self, n_past: int) -> None:
        """Ends the trunk at `n_past` and drops the tree.

        Raises:
            UnsupportedModelError: the cache cannot remove tokens; it is unchanged.
        """
        with self._changing(min(self.n_trunk, n_past)):
            # always call llama.cpp: an interrupted decode may have left cells we do not know of
            is_done = self._remove(TRUNK, n_past)
            if is_done:
                self._roll_branches_back(n_past)
                self.n_trunk = min(self.n_trunk, n_past)
                self._unpark(n_past)
        if not is_done:
            raise UnsupportedModelError("the cache cannot remove tokens")
        if self.spoiled:
            self.clear()

    def _roll_branches_back(self, n_past: int) -> None:
        for branch in range(HELD, self.n_sequences):
            if branch in self._branches or self._shared[branch] > n_past:
                self._remove(branch, min(self._shared[branch], n_past))
                self._shared[branch] = min(self._shared[branch], n_past)
        self._branches.clear()
        self.nodes.clear()

    def _unpark(self, n_past: int) -> None:
        """Frees parked cells that no longer have a trunk cell after them."""
        stay = [gap for gap in self._parked if gap[0] < n_past]
        if len(stay) == len(self._parked):
            return
        # a later gap may have lower positions than an earlier one; these cells stay parked, too
        end = max((pos + 1 for _, positions in stay for pos in positions), default=0)
        end = max(end, n_past) if stay else 0
        for base, positions in [gap for gap in self._parked if gap[0] >= n_past]:
            if left := [pos for pos in positions if pos < end]:
                stay.append((base, left))
        self._parked = stay
        self._free_parked(end)

    def _free_parked(self, start: int) -> None:
        if self.n_sequences > 1:
            for sequence in PARKED:
                self._remove(sequence, start)

    def forget_branches(self) -> None:
        """Empties all branches and the second holder, because after an error their content is not
        known.  Call `hold` afterwards."""
        with self._changing(self.n_trunk):
            for branch in range(HELD, self.n_sequences):
                self._remove(branch, 0)
                self._shared[branch] = 0

    def close_gaps(self) -> None:
        """Moves the trunk's cells into the gaps before them, so that no cells are parked.

        There must be no tree.  An error or interrupt leaves a shorter trunk.

        Raises:
            DecodeError: llama.cpp could not move the cells.
        """
        if not self._parked:
            return
        start, end = min(base for base, _ in self._parked), self.n_trunk
        with self._changing(start):
            for branch in range(HELD, self.n_sequences):
                self._share(branch, min(self._shared[branch], start))
            self.hold(start)
            self._free_parked(0)
            self._parked.clear()
            while start < end:
                stop = min(start - start % self._moved + self._moved, end)
                self._move(start, stop)
                self.certain = start = stop
            self.hold()

    def _move(self, start: int, end: int) -> None:
        """Moves the trunk's cells of positions start, ..., end - 1 to the first free cells."""
        state = self._state(start, end)
        self._api.llama_memory_seq_rm(self._memory, TRUNK, start, end)
        self._put(state, start, end)

    def _state(self, start: int, end: int) -> Any:
        """The keys and values of positions start, ..., end - 1 of the trunk, as llama.cpp writes
        them.

        Raises:
            DecodeError: llama.cpp could not write them.
        """
        sequence = self._moving()
        if sequence != TRUNK:
            self._copy(TRUNK, sequence, start, end)
        n_bytes = self._api.llama_state_seq_get_size(self._ctx, sequence)
        state = buffer(n_bytes)
        n_written = self._api.llama_state_seq_get_data(self._ctx, state, n_bytes, sequence)
        self._leave(sequence)
        if n_written != n_bytes:
            raise DecodeError("llama.cpp could not save cells of the KV cache")
        return state

    def _put(self, state: Any, start: int, end: int) -> None:
        """Puts what `_state` gave into the first free cells, as the trunk's positions."""
        n_bytes = len(state)
        sequence = self._moving()
        is_read = (
            self._api.llama_state_seq_set_data(self._ctx, state, n_bytes, sequence) == n_bytes
            and self._api.llama_memory_seq_pos_max(self._memory, sequence) == end - 1
        )
        if is_read and sequence != TRUNK:
            self._copy(sequence, TRUNK, start, end)
        self._leave(sequence)
        if not is_read:
            raise DecodeError("llama.cpp could not restore cells of the KV cache")

    def _moving(self) -> int:
        """An empty sequence for cells that are moved; the trunk itself if there is no other."""
        if self.n_sequences == 1:
            return TRUNK
        self._leave(FIRST_BRANCH)
        return FIRST_BRANCH

    def _leave(self, sequence: int) -> None:
        if sequence != TRUNK:
            self._remove(sequence, 0)
            self._shared[sequence] = 0

    # -- states ------------------------------------------------------------------------------------

    def states(self, n: int) -> Iterator[tuple[int, Any]]:
        """The first `n` positions of the trunk in pieces: the end of each, and its state.

        A state of all cells would lack those before a sliding window, which a rollback needs.
        There must be no tree.

        Raises:
            DecodeError: llama.cpp could not write a state.
        """
        start, step = 0, self._moved if self.n_sequences > 1 else n
        while start < n:
            end = min(start + step, n)
            with self._changing(self.n_trunk):
                state = self._state(start, end)
            yield end, state
            start = end

    def put(self, state: Any, end: int) -> None:
        """Appends a piece that `states` gave; the trunk then has `end` positions.

        Raises:
            DecodeError: llama.cpp refuses the state.
        """
        with self._changing(self.n_trunk):
            self._put(state, self.n_trunk, end)
            self.n_trunk = end
            self.hold()

    def only_trunk(self) -> None:
        """Frees everything but the trunk, and closes its gaps.  There must be no tree."""
        with self._changing(self.n_trunk):
            self.close_gaps()
            self.forget_branches()

    def assume(self, n_trunk: int) -> None:
        """Takes over a cache that other code filled.  The trunk ends at `n_trunk`."""
        with self._changing(0):
            self.n_trunk = n_trunk
            self._branches.clear()
            self.nodes.clear()
            self.forget_branches()
            self._free_parked(0)
            self._parked.clear()
            self._remove(TRUNK, n_trunk)
            self.hold()

    def hold(self, n: int | None = None) -> None:
        """Protects the trunk's cells (the first n) with a second holder.

        It is needed after a state was loaded or saved, and after `forget_branches`.  llama.cpp then
        searches for free cells from the first on, and takes those outside a sliding window if only
        one sequence holds them.  A rollback may still need them.
        """
        n = self.n_trunk if n is None else n
        if self.n_sequences > HELD:
            with self._changing(n):
                self._share(HELD, n)

    def clear(self) -> None:
        """Empties the cache.  This is always possible."""
        self.certain = 0
        self._api.llama_memory_clear(self._memory, self.spoiled)  # True: overwrite the numbers
        self.spoiled = False
        self.n_trunk = 0
        self.nodes.clear()
        self._branches.clear()
        self._parked.clear()
        self._shared = [0] * self.n_sequences
        self.certain = None

    # -- llama.cpp ---------------------------------------------------------------------------------

    def _share(self, branch: int, n: int) -> None:
        """Makes the branch hold exactly the first `n` cells of the trunk."""
        if self._shared[branch] > n:
            self._remove(branch, n)
        elif self._shared[branch] < n:
            self._copy(TRUNK, branch, self._shared[branch], n)
        self._shared[branch] = n

    def _copy(self, source: int, target: int, start: int, end: int) -> None:
        self._api.llama_memory_seq_cp(self._memory, source, target, start, end)

    def _remove(self, sequence: int, start: int) -> bool:
        return bool(self._api.llama_memory_seq_rm(self._memory, sequence, start, -1))
