"""Who holds which cells of llama.cpp's KV cache.

A cell is one position's keys and values, and belongs to any number of sequences.  The text so far
is the *trunk*.  A tree grows from its end; each of its branches is a sequence that shares the
trunk's cells, so nothing is ever copied.

Attention sums over cells in their order, and sums of floats depend on it: for a text decoded
through trees to be bit-identical to one decoded plainly, the trunk's cells must stay in the order
of its positions.  Where an accepted branch leaves gaps before its cells, they are therefore
*parked*, held by sequences that nobody reads, not freed: llama.cpp would fill them next.  Kernels
that sum blocks of cells (tiled and split attention) need the trunk without gaps: `close_gaps`.

llama.cpp also fills cells that a sliding window has passed, if a single sequence holds them and its
search for free ones comes by.  It goes on from the latest cell, so it comes by parked cells after a
rollback to between them, and by the trunk after a state was loaded.  Both then have two holders.

A Ctrl-C may come between what llama.cpp is told and what is noted here.  Whatever changes both
says beforehand how much of the trunk is certain meanwhile; that is what `mend` keeps afterwards.
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
"""Holds trunk cells beside the trunk; see `Cells.hold`."""
FIRST_BRANCH = 4
N_SEQUENCES = 48
"""Trunk, holders and branches: room for a scoring window of 32 positions, each a sequence."""
MAX_BRANCHES = N_SEQUENCES - FIRST_BRANCH
MOVED = 256
"""So many cells at most are moved at once, which need memory twice meanwhile."""


@dataclass(frozen=True)
class Node:
    """A token of the tree, and the cell it has or will have."""

    token: int
    parent: int
    pos: int
    sequences: list[int]
    """The first one is its own; the others are branches below it that it was decoded with."""


class Cells:
    """The cells of one context with one text, of `capacity` cells and `n_sequences` sequences.

    n_swa: positions that a sliding window sees, 0 without one.
    """

    def __init__(
        self, api: Any, ctx: Any, *, capacity: int, n_sequences: int, n_swa: int = 0
    ) -> None:
        self._api, self._ctx = api, ctx
        self._memory = api.llama_get_memory(ctx)
        self._moved = min(n_swa or MOVED, MOVED)  # a saved state lacks what the window has passed
        self.capacity = capacity
        self.n_sequences = n_sequences
        self.n_trunk = 0
        self.certain: int | None = None
        """So much of the trunk is, after what changed it was interrupted, until `mend`."""
        self.nodes: list[Node] = []
        self.spoiled = False
        """Cells hold what is not finite: sums that it is masked out of are not, either."""
        self._parked: list[tuple[int, list[int]]] = []  # trunk length before, positions of cells
        self._shared = [0] * n_sequences  # how much of the trunk each branch holds
        self._branches: set[int] = set()  # in use by the tree

    @property
    def free(self) -> int:
        """Cells that nobody holds."""
        return self.capacity - self.n_trunk - self.n_parked - len(self.nodes)

    @property
    def n_parked(self) -> int:
        return sum(len(positions) for _, positions in self._parked)

    # -- interrupts --------------------------------------------------------------------------------

    @contextmanager
    def _changing(self, certain: int) -> Iterator[None]:
        """Left by an error, `certain` stays said."""
        before = self.certain
        self.certain = certain if before is None else min(certain, before)
        yield
        self.certain = before

    def mend(self) -> None:
        """Keeps what of the trunk is certain after an interrupt, without gaps, and nothing else."""
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
        """Adds nodes that are about to be decoded in one batch, in this order.

        parents: of each, the number of a node before it (of this batch, too), or -1: the trunk's
            end.
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
        """A sequence that holds the trunk and the path to `parent`; nodes from `first` on will be
        decoded with it, the ones before are there already."""
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
        raise ValueError(f"a tree of more than {self.n_sequences - FIRST_BRANCH} branches")

    def keep(self, path: Sequence[int]) -> list[int]:
        """The nodes on `path`, from the trunk's end on, become trunk; the others are dropped.

        Returns their tokens.
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
        """Sequences for trunk positions start, ..., start + n - 1 to be decoded once more, each
        seeing the trunk before it and none of the others.  Free them with `close_window`."""
        branches = list(range(FIRST_BRANCH, FIRST_BRANCH + n))
        if branches[-1] >= self.n_sequences or self.nodes:
            raise ValueError(f"no window of {n} positions")
        with self._changing(self.n_trunk):
            for i, branch in enumerate(branches):
                self._share(branch, start + i)
                self._branches.add(branch)
        return branches

    def close_window(self) -> None:
        """Forgets what was decoded in the window's sequences."""
        with self._changing(self.n_trunk):
            for branch in self._branches:
                self._remove(branch, self._shared[branch])
            self._branches.clear()

    # -- the trunk ---------------------------------------------------------------------------------

    def rollback(self, n_past: int) -> None:
        """The trunk ends at `n_past`; the tree is gone.

        Raises:
            UnsupportedModelError: the cache cannot; it is as before.
        """
        with self._changing(min(self.n_trunk, n_past)):
            # Always told to llama.cpp: an interrupted decode may have left it more than we know.
            is_done = self._remove(TRUNK, n_past)
            if is_done:
                self._roll_branches_back(n_past)
                self.n_trunk = min(self.n_trunk, n_past)
                self._unpark(n_past)
        if not is_done:
            raise UnsupportedModelError("the cache cannot take tokens back")
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
        """Frees parked cells that no trunk cell comes after any more."""
        stay = [gap for gap in self._parked if gap[0] < n_past]
        if len(stay) == len(self._parked):
            return
        # a later gap may have a cell at a lower position than an earlier one: such stay parked, too
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
        """Empties all branches; after an error it is not certain what they hold.  Nothing is held
        either, until `hold`."""
        with self._changing(self.n_trunk):
            for branch in range(HELD, self.n_sequences):
                self._remove(branch, 0)
                self._shared[branch] = 0

    def close_gaps(self) -> None:
        """Moves the trunk's cells to before which cells are parked, so that none need be.

        There must be no tree.  An error or interrupt leaves a shorter trunk.

        Raises:
            DecodeError: llama.cpp could not.
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
        """The trunk's cells of positions start, ..., end - 1 into the first that are free."""
        api, ctx, moving = self._api, self._ctx, FIRST_BRANCH
        self._remove(moving, 0)
        self._shared[moving] = 0
        self._copy(TRUNK, moving, start, end)
        n_bytes = api.llama_state_seq_get_size(ctx, moving)
        state = buffer(n_bytes)
        is_saved = api.llama_state_seq_get_data(ctx, state, n_bytes, moving) == n_bytes
        api.llama_memory_seq_rm(self._memory, TRUNK, start, end)
        self._remove(moving, 0)
        if not is_saved or api.llama_state_seq_set_data(ctx, state, n_bytes, moving) != n_bytes:
            raise DecodeError("llama.cpp could not move cells of the cache")
        self._copy(moving, TRUNK, start, end)
        self._remove(moving, 0)

    def only_trunk(self) -> None:
        """Nothing but the trunk is held any more, and it has no gaps.  There must be no tree."""
        with self._changing(self.n_trunk):
            self.close_gaps()
            self.forget_branches()

    def assume(self, n_trunk: int) -> None:
        """The cache was filled by somebody else: the trunk ends at `n_trunk`."""
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
        """Keeps the trunk's (first n) cells from being filled anew, after a state was loaded or
        saved, or an error forgot who held them.

        llama.cpp then looks for cells from the first on, and takes those that a sliding window has
        passed, although they may be rolled back to; but none that two sequences hold.
        """
        n = self.n_trunk if n is None else n
        if self.n_sequences > HELD:
            with self._changing(n):
                self._share(HELD, n)

    def clear(self) -> None:
        """Nothing is held any more; always possible."""
        with self._changing(0):
            self._api.llama_memory_clear(self._memory, self.spoiled)  # with or without the numbers
            self.spoiled = False
            self.n_trunk = 0
            self.nodes.clear()
            self._branches.clear()
            self._parked.clear()
            self._shared = [0] * self.n_sequences

    # -- llama.cpp ---------------------------------------------------------------------------------

    def _share(self, branch: int, n: int) -> None:
        """The branch holds exactly the trunk's first `n` cells."""
        if self._shared[branch] > n:
            self._remove(branch, n)
        elif self._shared[branch] < n:
            self._copy(TRUNK, branch, self._shared[branch], n)
        self._shared[branch] = n

    def _copy(self, source: int, target: int, start: int, end: int) -> None:
        self._api.llama_memory_seq_cp(self._memory, source, target, start, end)

    def _remove(self, sequence: int, start: int) -> bool:
        return bool(self._api.llama_memory_seq_rm(self._memory, sequence, start, -1))
