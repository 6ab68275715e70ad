"""Who can send a piece, and what it costs.

Owns the costs of transfers and, for one way of cutting leaves over a grid, the tables
that tell who holds each piece and which of them is nearest to a target. Invariant:
the tables depend on the grid, the cutting axes and the losses alone, never on the
size of a leaf, so that all leaves of a state share a few of them.
"""

import enum
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from shardkit.places import Medium, Places

__all__ = ["UNAVAILABLE", "Cost", "Offers", "Pattern", "is_lost_in", "unravel"]

IntArray = Int[np.ndarray, "..."]


class Cost(enum.IntEnum):
    """What fetching a piece takes, the cheapest first.

    Up to `SAME_DEVICE` nothing moves: a piece that is `HELD` is the whole shard as the
    target needs it, padding included, any other has to be copied within its place.
    """

    HELD = 0
    SAME_DEVICE = 1
    SAME_HOST = 2
    NETWORK = 3
    HOST_MEMORY = 4
    FAR_HOST_MEMORY = 5
    DISK = 6
    FAR_DISK = 7


UNAVAILABLE = len(Cost)
"""Costs more than anything: nobody is left that has the piece."""


class Offers(NamedTuple):
    """The cheapest senders for each of many requests.

    Attributes:
        cost: A `Cost`, or `UNAVAILABLE`.
        start: The first of the senders that cost this, in `Pattern.senders`.
        count: How many of them there are.
    """

    cost: Int[np.ndarray, " requests"]
    start: Int[np.ndarray, " requests"]
    count: Int[np.ndarray, " requests"]


class Pattern:
    """The pieces of all leaves that are cut alike over one grid.

    Attributes:
        places: The grid.
        counts: The number of pieces along each dim that is cut in any layout.
        table: For every piece, the positions of the places that hold it, by host.
        piece_of: For every position, its piece.
        senders: Positions that are alive, twice: by piece and host; then by piece in
            an order that goes around the hosts.
        available: For every piece, whether anyone alive holds it.
        period: After how many turns the same senders come again for all pieces.
    """

    def __init__(
        self,
        places: Places,
        cuts: tuple[tuple[str, ...], ...],
        is_lost: Callable[[Places], np.ndarray],
        hosts: IntArray,
    ) -> None:
        """Builds the tables.

        Args:
            places: The grid.
            cuts: For every dim that is cut in any layout, the axes that cut it here.
            is_lost: Marks the positions of a grid whose contents are gone.
            hosts: All hosts of the plan, sorted; elsewhere a host is an index into it.
        """
        self.places, self.hosts, self.num_hosts = places, hosts, len(hosts)
        self.host = np.searchsorted(hosts, places.hosts.ravel())
        sizes = places.axis_sizes
        self.counts = tuple(
            int(np.prod([sizes[a] for a in cut], dtype=int)) for cut in cuts
        )
        order = [places.axes.index(axis) for cut in cuts for axis in cut]
        order += [i for i in range(len(places.axes)) if i not in order]
        num_pieces = int(np.prod(self.counts, dtype=int))
        positions = np.arange(places.ids.size).reshape(places.ids.shape)
        table = positions.transpose(order).reshape(num_pieces, -1)
        by_host = np.argsort(self.host[table], axis=1, kind="stable")
        self.table = np.take_along_axis(table, by_host, axis=1)
        self.piece_of = np.empty(places.ids.size, np.int64)
        self.piece_of[self.table] = np.arange(num_pieces)[:, None]
        alive = np.flatnonzero(~is_lost(places))
        self._sort(alive, num_pieces)
        self._own: dict[Places, tuple[IntArray, IntArray]] = {}

    def _sort(self, alive: IntArray, num_pieces: int) -> None:
        piece, host = self.piece_of[alive], self.host[alive]
        near = np.lexsort((alive, host, piece))
        self._keys = piece[near] * self.num_hosts + host[near]
        new = np.flatnonzero(np.diff(self._keys, prepend=-1))
        rank = np.arange(len(near)) - np.repeat(new, np.diff(new, append=len(near)))
        far = near[np.lexsort((host[near], rank, piece[near]))]
        self.senders = np.concatenate([alive[near], alive[far]])
        self._count = np.bincount(piece, minlength=num_pieces)
        self._start = len(alive) + np.cumsum(self._count) - self._count
        self.available = self._count > 0
        self.has_choice = bool((self._count > 1).any())
        num_near = np.diff(new, append=len(near))
        choices = np.unique(np.concatenate([self._count, num_near]))
        self.period = math.lcm(*choices[choices > 0].tolist())
        self._slot = np.full(self.piece_of.shape, -1)
        self._slot[alive[near]] = np.arange(len(near))

    @functools.cached_property
    def index_of(self) -> tuple[IntArray, ...]:
        """For every dim, the index of the piece at each position."""
        return unravel(self.piece_of, self.counts)

    def own(self, target: Places) -> tuple[IntArray, IntArray]:
        """Which piece each target holds itself, -1 for none, and its sender entry."""
        if target not in self._own:
            at = np.full(target.ids.size, -1)
            if target.medium == self.places.medium:
                slots = self.places.slots
                at[:] = [slots.get(id, -1) for id in target.ids.ravel().tolist()]
            entry = np.where(at < 0, -1, self._slot[at])
            self._own[target] = np.where(entry < 0, -1, self.piece_of[at]), entry
        return self._own[target]

    def offers(
        self, piece: IntArray, target: "Pattern", at: IntArray, whole: bool
    ) -> Offers:
        """Finds who sends pieces to targets at the least cost.

        Args:
            piece: The piece of which each request wants a part.
            target: The pattern on the other side.
            at: The position there that wants it.
            whole: Whether pieces are the same there, padding included.
        """
        near = 2 + 2 * int(self.places.medium)
        count, start, host = self._count[piece], self._start[piece], target.host[at]
        if self.has_choice:
            key = piece * self.num_hosts + host
            low = np.searchsorted(self._keys, key)
            num_near = np.searchsorted(self._keys, key, "right") - low
            is_near = num_near > 0
            start = np.where(is_near, low, start)
            count = np.where(is_near, num_near, count)
        elif not len(self.senders):
            is_near = np.zeros(piece.shape, bool)
        else:
            # Where nobody is left, the entry is someone else's, and goes unused.
            first = self.senders[np.minimum(start, len(self.senders) - 1)]
            is_near = self.host[first] == host
        cost = np.where(is_near, near, near + 1)
        cost[count == 0] = UNAVAILABLE
        own_piece, own_entry = self.own(target.places)
        if (own_piece >= 0).any():
            local = np.flatnonzero(own_piece[at] == piece)
            cost[local] = Cost.HELD if whole else Cost.SAME_DEVICE
            start[local], count[local] = own_entry[at[local]], 1
        return Offers(cost, start, count)


def unravel(index: IntArray, shape: tuple[int, ...]) -> tuple[IntArray, ...]:
    """Splits flat indices by dim; numpy refuses to do so for no dims."""
    return tuple(np.unravel_index(index, shape)) if shape else ()


def is_lost_in(
    lost: frozenset[int], lost_hosts: frozenset[int]
) -> Callable[[Places], np.ndarray]:
    """Marks lost devices, and all that is in or on a lost host."""

    def is_lost(places: Places) -> np.ndarray:
        gone = np.isin(places.hosts.ravel(), sorted(lost_hosts))
        if places.medium == Medium.DEVICE:
            gone |= np.isin(places.ids.ravel(), sorted(lost))
        return gone

    return is_lost
