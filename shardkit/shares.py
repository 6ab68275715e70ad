"""How much of a new shard each device has already.

Owns `Shares`: for every device and every position of a new mesh the bytes that the
device holds of what the position wants. Invariant: they are kept by old and new piece,
which many devices and leaves have in common, and spread out only when asked for.
"""

import collections
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from shardkit.cells import refine
from shardkit.layout import Layout
from shardkit.places import Places
from shardkit.senders import Pattern, is_lost_in

__all__ = ["Shares"]

_MAX_DENSE = 1 << 22
_MAX_ENTRIES = 1 << 24
_Cut = tuple[Places, tuple[tuple[str, ...], ...]]
IntArray = Int[np.ndarray, "..."]


class Shares:
    """What each device has of what each position wants.

    Attributes:
        wanted: The bytes of all positions together.
    """

    def __init__(
        self,
        source: Mapping[str, Layout],
        target: Mapping[str, Layout],
        devices: Places,
    ) -> None:
        """Adds up all leaves.

        Args:
            source: Where they are.
            target: Where they are wanted, on one grid.
            devices: Who can take a position, numbered in this order.
        """
        self.wanted = 0
        units: collections.Counter[tuple[tuple[int, ...], _Cut, _Cut]]
        units = collections.Counter()
        for path, new in target.items():
            old = source[path]
            dims = [
                dim
                for dim, pair in enumerate(zip(old.counts, new.counts, strict=True))
                if max(pair) > 1
            ]
            rest = [n for dim, n in enumerate(new.shape) if dim not in dims]
            cut = [(x.places, tuple(x.cuts[dim] for dim in dims)) for x in (old, new)]
            key = tuple(new.shape[dim] for dim in dims), cut[0], cut[1]
            units[key] += new.itemsize * math.prod(rest)
            replicas = new.places.ids.size // math.prod(new.counts)
            self.wanted += new.num_bytes * replicas
        tables: dict[tuple[_Cut, _Cut], _Table] = {}
        for (sizes, old, new), unit in units.items():
            if (old, new) not in tables:
                tables[old, new] = _Table(old, new, devices)
            tables[old, new].add(sizes, unit)
        self._tables = list(tables.values())
        for table in self._tables:
            table.finish()

    def kept(self, order: Int[np.ndarray, " positions"]) -> int:
        """Bytes that stay where they are if these devices take the positions."""
        return sum(table.kept(order) for table in self._tables)

    def dense(self) -> Int[np.ndarray, "devices positions"]:
        """All shares; there has to be a leaf."""
        first, *rest = (table.dense() for table in self._tables)
        for shares in rest:
            first += shares
        return first

    def entries(self) -> tuple[IntArray, IntArray, IntArray]:
        """Device, position and bytes of shares that make a difference.

        Leaves of which every piece has too many holders and takers are left out, and
        so are those that are whole everywhere.
        """
        found = [(np.zeros(0, np.int64),) * 3, *(t.entries() for t in self._tables)]
        device, at, share = (np.concatenate(x) for x in zip(*found, strict=True))
        num = int(at.max(initial=0)) + 1
        key, where = np.unique(device * num + at, return_inverse=True)
        total = np.zeros(len(key), np.int64)
        np.add.at(total, where, share)
        return key // num, key % num, total


class _Table:
    """Leaves that are cut alike: bytes by old piece and new piece."""

    def __init__(self, old: _Cut, new: _Cut, devices: Places) -> None:
        grids = old[0], new[0], devices
        hosts = np.unique(np.concatenate([grid.hosts.ravel() for grid in grids]))
        nothing = is_lost_in(frozenset(), frozenset())
        self._old = Pattern(*old, nothing, hosts)
        self._new = Pattern(*new, nothing, hosts)
        # By device; -1 for those that hold nothing.
        self._held, _ = self._old.own(devices)
        self._shape = len(self._old.table), len(self._new.table)
        num = math.prod(self._shape)
        self._sums = np.zeros(num if num <= _MAX_DENSE else 0, np.int64)
        self._lists: list[tuple[IntArray, IntArray]] = []

    def add(self, sizes: tuple[int, ...], unit: int) -> None:
        """Adds leaves of these sizes, `unit` bytes per element together."""
        window = tuple((0, size) for size in sizes)
        cells = refine(sizes, [self._old.counts, self._new.counts], window)
        key = cells.pieces[0] * self._shape[1] + cells.pieces[1]
        if len(self._sums):
            np.add.at(self._sums, key, cells.volume * unit)
        else:
            self._lists.append((key, cells.volume * unit))

    def finish(self) -> None:
        """Sorts what was added."""
        if len(self._sums):
            self._keys = np.flatnonzero(self._sums)
            self._bytes = self._sums[self._keys]
        else:
            keys, num_bytes = (
                np.concatenate(x) for x in zip(*self._lists, strict=True)
            )
            self._keys, where = np.unique(keys, return_inverse=True)
            self._bytes = np.zeros(len(self._keys), np.int64)
            np.add.at(self._bytes, where, num_bytes)
        self._sums, self._lists = np.zeros(0, np.int64), []

    def kept(self, order: IntArray) -> int:
        held = self._held[order]
        key = held * self._shape[1] + self._new.piece_of
        if not len(self._keys):
            return 0
        where = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        return int(self._bytes[where][(held >= 0) & (self._keys[where] == key)].sum())

    def dense(self) -> Int[np.ndarray, "devices positions"]:
        # The last row is that of devices which hold nothing.
        table = np.zeros((self._shape[0] + 1, self._shape[1]), np.int64)
        table.flat[self._keys] = self._bytes
        return table[self._held][:, self._new.piece_of]

    def entries(self) -> tuple[IntArray, IntArray, IntArray]:
        device = np.argsort(self._held, kind="stable")
        piece, wanted = np.divmod(self._keys, self._shape[1])
        start = np.searchsorted(self._held[device], piece)
        count = np.searchsorted(self._held[device], piece, "right") - start
        takers = self._new.table.shape[1]
        if self._shape == (1, 1) or int(count.sum()) * takers > _MAX_ENTRIES:
            nothing = np.zeros(0, np.int64)
            return nothing, nothing, nothing
        entry = np.repeat(np.arange(len(piece)), count)
        rank = np.arange(len(entry)) - np.repeat(np.cumsum(count) - count, count)
        at = self._new.table[wanted[entry]]
        holder = device[start[entry] + rank]
        return (
            np.repeat(holder, takers),
            at.ravel(),
            np.repeat(self._bytes[entry], takers),
        )
