"""What a transfer plan costs: bytes by device, by link and by kind of source.

Owns `Totals` and how it is added up. Invariant: every number is an exact integer and
equals the sum over the transfers that the plan lists, but nothing is listed: leaves
that are cut alike are counted together, in arrays over their pieces.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from shardkit.layout import Box
from shardkit.places import Medium
from shardkit.routes import Level, Route, Rows
from shardkit.senders import Cost, Pattern, unravel

__all__ = ["Load", "Totals", "add_up", "lacking"]

_MAX_ROWS = 1 << 21
_MAX_DENSE = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Totals:
    """The bytes of a plan. Only what is not zero has an entry.

    Attributes:
        bytes_moved: What goes from one place to another.
        min_bytes: What any plan has to bring to places that lack it; found from the
            boxes, without looking at senders.
        min_network_bytes: What comes from devices of other hosts if each part is
            counted once per host, however many of its devices want it.
        by_cost: `Cost` → bytes moved.
        links: (host of the source, host of the target) → bytes moved.
        sent: Device → bytes sent.
        received: Target → bytes received.
        scratch: Device → the most that moving a single leaf takes beside what was
            there before: the new shard, the parts of it that arrive one by one, and
            the parts cut out of the old shard for others. Where several sources can
            serve one piece, it may be less.
    """

    bytes_moved: int
    min_bytes: int
    min_network_bytes: int
    by_cost: Mapping[Cost, int]
    links: Mapping[tuple[int, int], int]
    sent: Mapping[int, int]
    received: Mapping[int, int]
    scratch: Mapping[int, int]


@dataclasses.dataclass(frozen=True)
class Load:
    """One leaf of a route.

    Attributes:
        unit_bytes: Bytes per element of the dims that are cut.
        turn: Where the leaf starts to go around equal senders.
    """

    unit_bytes: int
    turn: int


def add_up(routes: Iterable[tuple[Route, Sequence[Load]]]) -> Totals:
    """Adds up all leaves, given by route."""
    routes = [(route, loads) for route, loads in routes if loads]
    sums = _Sums([route for route, _ in routes])
    for route, loads in routes:
        sums.add(route, loads)
    return sums.finish()


def intervals(
    route: Route, pattern: Pattern, piece: Int[np.ndarray, " n"]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every dim the start and stop of many pieces; empty for piece -1."""
    steps, found = route.piece(pattern), []
    indices = unravel(np.maximum(piece, 0), pattern.counts)
    for index, step, size in zip(indices, steps, route.sizes, strict=True):
        low = np.minimum(index * step, size)
        found.append((low, np.where(piece < 0, low, np.minimum(low + step, size))))
    return found


def lacking(route: Route) -> Int[np.ndarray, " targets"]:
    """Elements that each target wants and has not, by inclusion and exclusion."""
    target = route.target
    owned = []
    for member in (m for level in route.levels for m in level.members):
        piece, _ = member.own(target.places)
        if (piece >= 0).any():
            owned.append((piece, intervals(route, member, piece)))
    wanted = intervals(route, target, target.piece_of)
    total = np.zeros(target.piece_of.shape, np.int64)
    for num in range(len(owned) + 1):
        for subset in itertools.combinations(owned, num):
            volume = np.full(total.shape, (-1) ** num)
            for dim, (low, high) in enumerate(wanted):
                for _, boxes in subset:
                    low = np.maximum(low, boxes[dim][0])
                    high = np.minimum(high, boxes[dim][1])
                volume *= np.maximum(high - low, 0)
            for piece, _ in subset:
                volume[piece < 0] = 0
            total += volume
    return total


class _Sums:
    """Counts in arrays over the ids of all devices and targets."""

    def __init__(self, routes: Sequence[Route]) -> None:
        patterns = {id(p): p for route in routes for p in _patterns(route)}.values()
        places = {pattern.places for pattern in patterns}
        ids = [p.ids.ravel() for p in places]
        self._ids = np.unique(np.concatenate(ids)) if ids else np.zeros(0, np.int64)
        self._codes = {p: np.searchsorted(self._ids, p.ids.ravel()) for p in places}
        self._by_cost = np.zeros(len(Cost), np.int64)
        self._min_bytes = self._min_network = 0
        self._sent, self._received, self._scratch = (
            np.zeros(len(self._ids), np.int64) for _ in range(3)
        )
        self._hosts = routes[0].target.hosts if routes else np.zeros(0, np.int64)
        num = len(self._hosts) ** 2
        self._dense_links = np.zeros(num if num <= _MAX_DENSE else 0, np.int64)
        self._links: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, route: Route, loads: Sequence[Load]) -> None:
        """Adds the leaves of a route."""
        target, total = route.target, sum(load.unit_bytes for load in loads)
        self._min_bytes += total * int(lacking(route).sum())
        turns = _turns(route, loads)
        num = len(target.piece_of)
        received, staged = np.zeros(num, np.int64), np.zeros(num, np.int64)
        sliced = np.zeros((len(turns), len(self._ids)), np.int64)
        for level in route.levels:
            codes, hosts = self._senders(level)
            for window in _windows(route, level):
                rows = route.rows(level, window)
                moved = rows.volume * (rows.cost > Cost.SAME_DEVICE)
                self._by_cost += total * _count(rows.cost, moved, len(Cost))
                self._min_network += total * _once_per_host(rows, target)
                part = moved * ~_are_whole(route, level, rows)
                received += _count(rows.at, moved, num)
                staged += _count(rows.at, part, num)
                where, size = target.host[rows.at], len(self._ids) + 1
                for i, (turn, (num_bytes, _)) in enumerate(turns.items()):
                    sender = rows.senders(turn)
                    code = codes[sender]
                    self._link(hosts[sender], where, moved * num_bytes)
                    self._sent += num_bytes * _count(code, moved, size)[:-1]
                    sliced[i] += _count(code, part, size)[:-1]
        self._received[self._codes[target.places]] += received * total
        new = np.where(_keep(route), 0, math.prod(route.piece(target))) + staged
        for extra, (_, most) in zip(sliced, turns.values(), strict=True):
            if target.places.medium == Medium.DEVICE:
                extra[self._codes[target.places]] += new
            np.maximum(self._scratch, extra * most, out=self._scratch)

    def _senders(self, level: Level) -> tuple[np.ndarray, np.ndarray]:
        """The device, if it is one, and the host of every sender of a level."""
        codes, hosts = [], []
        for member in level.members:
            if member.places.medium == Medium.DEVICE:
                codes.append(self._codes[member.places][member.senders])
            else:
                codes.append(np.full(member.senders.shape, len(self._ids)))
            hosts.append(member.host[member.senders])
        return np.concatenate(codes), np.concatenate(hosts)

    def _link(
        self, source: np.ndarray, target: np.ndarray, num_bytes: np.ndarray
    ) -> None:
        key = source * len(self._hosts) + target
        if len(self._dense_links):
            np.add.at(self._dense_links, key, num_bytes)
            return
        # Neighbouring pieces mostly share their hosts.
        first = np.flatnonzero(np.diff(key, prepend=-1))
        if len(first):
            self._links.append((key[first], np.add.reduceat(num_bytes, first)))

    def finish(self) -> Totals:
        """Names what was counted."""
        keys = np.flatnonzero(self._dense_links)
        total = self._dense_links[keys]
        if self._links:
            found, num_bytes = map(np.concatenate, zip(*self._links, strict=True))
            keys, where = np.unique(found, return_inverse=True)
            total = np.zeros(len(keys), np.int64)
            np.add.at(total, where, num_bytes)
        hosts, num = self._hosts.tolist(), max(len(self._hosts), 1)
        return Totals(
            bytes_moved=int(self._by_cost.sum()),
            min_bytes=self._min_bytes,
            min_network_bytes=self._min_network,
            by_cost={cost: n for cost in Cost if (n := int(self._by_cost[cost]))},
            links={
                (hosts[key // num], hosts[key % num]): n
                for key, n in zip(keys.tolist(), total.tolist(), strict=True)
                if n
            },
            sent=self._named(self._sent),
            received=self._named(self._received),
            scratch=self._named(self._scratch),
        )

    def _named(self, values: np.ndarray) -> dict[int, int]:
        (where,) = np.nonzero(values)
        return dict(zip(self._ids[where].tolist(), values[where].tolist(), strict=True))


def _patterns(route: Route) -> Iterator[Pattern]:
    yield route.target
    for level in route.levels:
        yield from level.members


def _count(where: np.ndarray, volume: np.ndarray, size: int) -> np.ndarray:
    # Floats are exact here: the elements of the dims that are cut are far below 2**53.
    return np.bincount(where, volume, size).astype(np.int64)


def _turns(route: Route, loads: Sequence[Load]) -> dict[int, tuple[int, int]]:
    """Groups leaves that go to the same senders: turn → sum and maximum of bytes."""
    turns: dict[int, tuple[int, int]] = {}
    for load in loads:
        turn = load.turn % route.period
        total, most = turns.get(turn, (0, 0))
        turns[turn] = total + load.unit_bytes, max(most, load.unit_bytes)
    return turns


def _windows(route: Route, level: Level) -> list[Box]:
    """Cuts the leaf between source pieces, so that memory stays bounded."""
    patterns = [route.target, *level.members, *level.above]
    num = route.target.table.shape[1] * math.prod(
        min(size, sum(pattern.counts[dim] for pattern in patterns))
        for dim, size in enumerate(route.sizes)
    )
    if num <= _MAX_ROWS or len(level.members) > 1 or not route.sizes:
        return [route.window]
    (member,) = list(level.members)
    dim = int(np.argmax(member.counts))
    step = route.piece(member)[dim] * max(1, member.counts[dim] * _MAX_ROWS // num)
    size, rest = route.sizes[dim], route.window
    return [
        (*rest[:dim], (low, min(low + step, size)), *rest[dim + 1 :])
        for low in range(0, size, step)
    ]


def _are_whole(route: Route, level: Level, rows: Rows) -> Bool[np.ndarray, " rows"]:
    """Marks rows that are a shard of the source and of the target as it is."""
    whole = np.array([route.is_whole(member) for member in level.members])
    if not any(whole):
        return np.zeros(len(rows.at), bool)
    member = np.searchsorted(level.offsets, rows.start, "right") - 1
    size = np.ones(len(route.target.piece_of), np.int64)
    for low, high in intervals(route, route.target, route.target.piece_of):
        size *= high - low
    return whole[member] & (rows.volume == size[rows.at])


def _keep(route: Route) -> Bool[np.ndarray, " targets"]:
    """Marks targets whose array stays as it is, if only for its padding."""
    keep = np.zeros(route.target.piece_of.shape, bool)
    for member in (m for level in route.levels for m in level.members):
        if not route.is_whole(member):
            continue
        wanted = intervals(route, route.target, route.target.piece_of)
        piece, _ = member.own(route.target.places)
        same = piece >= 0
        held = intervals(route, member, piece)
        for (low, high), (start, stop) in zip(held, wanted, strict=True):
            same &= (low == start) & (high == stop)
        keep |= same
    return keep


def _once_per_host(rows: Rows, target: Pattern) -> int:
    """Elements that come over the network, counted once per target host."""
    far = np.flatnonzero(rows.cost == Cost.NETWORK)
    if target.table.shape[1] > 1:
        # The rows of a cell are in the order of their hosts.
        key = rows.cell[far] * target.num_hosts + target.host[rows.at[far]]
        far = far[np.flatnonzero(np.diff(key, prepend=-1))]
    return int(rows.volume[far].sum())
