"""The part of a route that concerns one place.

Owns the windows that have to be looked at to list what one target wants or one source
sends. Invariant: what is listed is a part of what the whole route holds, chosen alike,
at a price that does not grow with the number of places.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from shardkit.cells import merge
from shardkit.layout import Box
from shardkit.places import Medium
from shardkit.routes import Level, Route, Rows
from shardkit.senders import Cost

__all__ = ["Parcel", "Requests", "list_parcels", "offered_by", "wanted_by"]


class Parcel(NamedTuple):
    """What a transfer is for all leaves of a route: see `transfer.Transfer`.

    Its box has the dims of the route only, and its size is in elements of these.
    """

    box: Box
    source: int
    source_index: int
    medium: Medium
    target: int
    cost: Cost
    volume: int
    is_whole: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Requests:
    """What one place has to do with one level of a route.

    Attributes:
        level: The level.
        rows: Requests, more than are meant.
        keep: Which of them are.
        senders: If given, only those that go to one of these senders.
    """

    level: Level
    rows: Rows
    keep: Int[np.ndarray, " kept"]
    senders: Int[np.ndarray, " senders"] | None = None

    def choose(self, turn: int) -> Iterator[tuple[int, int]]:
        """Yields each row and its sender for the leaf whose turn it is."""
        sender = self.rows.senders(turn)[self.keep]
        if self.senders is None:
            mine = slice(None)
        else:
            mine = np.isin(sender, self.senders)
        yield from zip(self.keep[mine].tolist(), sender[mine].tolist(), strict=True)


def wanted_by(route: Route, target: int) -> list[Requests]:
    """Finds what one target wants, what it has included."""
    at, found = route.target.places.slots.get(target), []
    if at is None:
        return found
    box = route.box(route.target, at)
    for level in route.levels:
        # Turns are taken among all who want a source's piece, so look at them all.
        if not level.above or len(route.cells(level, box).volume):
            rows = route.rows(level, route.widen(level, box))
            found.append(Requests(level, rows, np.flatnonzero(rows.at == at)))
    return found


def offered_by(route: Route, source: int, medium: Medium) -> list[Requests]:
    """Finds what one source is asked for, by itself included."""
    found = []
    for level in route.levels:
        for number, member in enumerate(level.members):
            at = member.places.slots.get(source)
            if at is None or member.places.medium != medium:
                continue
            rows = route.rows(level, route.box(member, at))
            senders = level.offsets[number] + np.flatnonzero(member.senders == at)
            found.append(Requests(level, rows, np.arange(len(rows.at)), senders))
    return found


def list_parcels(route: Route, requests: Iterable[Requests], turn: int) -> list[Parcel]:
    """Lists requests by target and box, neighbours from one sender as one."""
    parcels = []
    for some in requests:
        rows, boxes = some.rows, {}
        for row, sender in some.choose(turn):
            key = sender, int(rows.at[row]), int(rows.cost[row])
            boxes.setdefault(key, []).append(rows.cells.box(int(rows.cell[row])))
        for (sender, at, cost), parts in boxes.items():
            for box in merge(parts) if len(parts) > 1 else parts:
                parcels.append(_parcel(route, some.level, sender, at, cost, box))
    return sorted(parcels, key=lambda parcel: (parcel.target, parcel.box))


def _parcel(
    route: Route, level: Level, sender: int, at: int, cost: int, box: Box
) -> Parcel:
    number, position = level.member_of(sender)
    member = level.members[number]
    whole = route.is_whole(member) and box == route.box(route.target, at)
    if cost <= Cost.SAME_DEVICE:
        cost = Cost.HELD if whole else Cost.SAME_DEVICE
    return Parcel(
        box,
        int(member.places.ids.flat[position]),
        level.numbers[number],
        member.places.medium,
        int(route.target.places.ids.flat[at]),
        Cost(cost),
        math.prod(stop - start for start, stop in box),
        whole,
    )
