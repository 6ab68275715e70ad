"""From whom every part of a leaf comes.

Owns `Route`: the choice of a sender for each cell of a leaf and each target that wants
it. Invariant: a request costs the least that any living sender asks, and the choice
depends on nothing but the arguments. All of it is in elements of the dims that are
cut; what a leaf's other dims and its dtype add is a factor.

Senders that cost the same are dealt the requests for a piece in turn, the largest
first: then none of them sends more than any other by more than one request.

References:
    Graham, Bounds on Multiprocessing Timing Anomalies (SIAM J. Appl. Math. 1969).
"""

import dataclasses
import functools
import itertools
import math

import numpy as np
from jaxtyping import Bool, Int

from shardkit.cells import Cells, refine
from shardkit.layout import Box
from shardkit.senders import UNAVAILABLE, Offers, Pattern

__all__ = ["Level", "Route", "Rows"]


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """Sources on one medium, for what no cheaper medium has.

    Attributes:
        members: The patterns of the sources.
        numbers: Their places in the list that was given.
        above: The patterns of all sources on cheaper media.
    """

    members: tuple[Pattern, ...]
    numbers: tuple[int, ...]
    above: tuple[Pattern, ...]

    @functools.cached_property
    def offsets(self) -> list[int]:
        """Where each member's senders start when all are put in one list."""
        sizes = (len(member.senders) for member in self.members)
        return list(itertools.accumulate(sizes, initial=0))

    def member_of(self, sender: int) -> tuple[int, int]:
        """Which member a sender belongs to, and its position there."""
        member = int(np.searchsorted(self.offsets, sender, "right")) - 1
        position = self.members[member].senders[sender - self.offsets[member]]
        return member, int(position)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Requests: each is a cell that one target wants, from one of `count` senders.

    Attributes:
        cells: The cells.
        cell: The cell of each row.
        at: The target's position.
        cost: A `Cost`.
        start: The first of the senders that cost this.
        count: How many there are.
        turn: How many senders to skip, before the leaf's own turn is added.
        has_choice: Whether any count is above 1.
    """

    cells: Cells
    cell: Int[np.ndarray, " rows"]
    at: Int[np.ndarray, " rows"]
    cost: Int[np.ndarray, " rows"]
    start: Int[np.ndarray, " rows"]
    count: Int[np.ndarray, " rows"]
    turn: Int[np.ndarray, " rows"]
    has_choice: bool

    @functools.cached_property
    def volume(self) -> Int[np.ndarray, " rows"]:
        """Elements in each row."""
        return self.cells.volume[self.cell]

    def senders(self, turn: int) -> Int[np.ndarray, " rows"]:
        """Who sends each row of the leaf whose turn it is, in the level's list."""
        if not self.has_choice:
            return self.start
        return self.start + (self.turn + turn) % self.count


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
    """All leaves that are cut alike and have the same sizes where they are.

    Attributes:
        sizes: The sizes of the dims that any layout cuts.
        target: The pattern wanted.
        levels: The sources, cheapest medium first.
    """

    sizes: tuple[int, ...]
    target: Pattern
    levels: tuple[Level, ...]

    @property
    def window(self) -> Box:
        """The whole leaf."""
        return tuple((0, size) for size in self.sizes)

    @functools.cached_property
    def period(self) -> int:
        """After how many turns a leaf goes to the same senders again."""
        members = (member for level in self.levels for member in level.members)
        return math.lcm(*(member.period for member in members))

    def piece(self, pattern: Pattern) -> tuple[int, ...]:
        """The physical shape of a pattern's pieces."""
        return tuple(
            -(-n // c) for n, c in zip(self.sizes, pattern.counts, strict=True)
        )

    def is_whole(self, source: Pattern) -> bool:
        """Whether a source's pieces are the target's, padding included."""
        return self.piece(source) == self.piece(self.target)

    def box(self, pattern: Pattern, position: int) -> Box:
        """What a position of a pattern holds."""
        return tuple(
            (min(i * p, n), min((i + 1) * p, n))
            for i, p, n in zip(
                (int(index[position]) for index in pattern.index_of),
                self.piece(pattern),
                self.sizes,
                strict=True,
            )
        )

    def widen(self, level: Level, window: Box) -> Box:
        """Extends a window to whole source pieces, among which turns are taken."""
        steps = [self.piece(member) for member in level.members]
        return tuple(
            (
                min(low - low % step[dim] for step in steps),
                min(max(high + -high % step[dim] for step in steps), self.sizes[dim]),
            )
            if low < high
            else (low, high)
            for dim, (low, high) in enumerate(window)
        )

    def cells(self, level: Level, window: Box) -> Cells:
        """What a level has to bring of a window: pieces are target's, then sources'."""
        patterns = (self.target, *level.members, *level.above)
        cells = refine(self.sizes, [pattern.counts for pattern in patterns], window)
        if not level.above:
            return cells
        keep = np.ones(len(cells.volume), bool)
        for pattern, piece in zip(
            level.above, cells.pieces[1 + len(level.members) :], strict=True
        ):
            keep &= ~pattern.available[piece]
        return cells.take(keep)

    def missing(self) -> Cells:
        """What nobody has."""
        patterns = [member for level in self.levels for member in level.members]
        counts = [pattern.counts for pattern in patterns]
        cells = refine(self.sizes, counts, self.window)
        keep = np.ones(len(cells.volume), bool)
        for pattern, piece in zip(patterns, cells.pieces, strict=True):
            keep &= ~pattern.available[piece]
        return cells.take(keep)

    def rows(self, level: Level, window: Box) -> Rows:
        """Chooses the senders of a window of whole source pieces."""
        cells = self.cells(level, window)
        table = self.target.table[cells.pieces[0]]
        cell = np.repeat(np.arange(len(table)), table.shape[1])
        at = table.ravel()
        best: Offers | None = None
        turn = np.zeros(len(at), np.int64)
        for i, member in enumerate(level.members):
            piece = cells.pieces[1 + i][cell]
            new = member.offers(piece, self.target, at, self.is_whole(member))
            new = new._replace(start=new.start + level.offsets[i])
            if best is None:
                best, turn = new, piece
                continue
            worse = new.cost >= best.cost
            best = Offers(
                *(np.where(worse, a, b) for a, b in zip(best, new, strict=True))
            )
            turn = np.where(worse, turn, piece)
        assert best is not None
        has_choice = any(member.has_choice for member in level.members)
        rows = Rows(cells, cell, at, *best, turn, has_choice)
        if has_choice:
            _deal(rows)
        if (best.cost == UNAVAILABLE).any():
            rows = _take(rows, best.cost < UNAVAILABLE)
        return rows


def _deal(rows: Rows) -> None:
    """Adds the rank of each row among those with the same senders, by size."""
    open_ = np.flatnonzero(rows.count > 1)
    if not len(open_):
        return
    group = rows.start[open_]
    order = np.lexsort((-rows.volume[open_], group))
    group = group[order]
    first = np.flatnonzero(np.diff(group, prepend=-1))
    rank = np.arange(len(group)) - np.repeat(first, np.diff(first, append=len(group)))
    rows.turn[open_[order]] += rank


def _take(rows: Rows, keep: Bool[np.ndarray, " rows"]) -> Rows:
    fields = {
        name: getattr(rows, name)[keep]
        for name in ("cell", "at", "cost", "start", "count", "turn")
    }
    return dataclasses.replace(rows, **fields)
