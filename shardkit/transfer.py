"""Plans of transfers: where every place takes from what it is to hold.

Owns `TransferPlan`, which live resharding, recovery from copies and remapping of a
checkpoint carry out alike. Invariant: what it lists for a target are disjoint boxes
that together are exactly what the target holds afterwards; each comes from the
cheapest place that has it, and nothing moves that was already there. It moves nothing
itself, and it lists transfers only for those who ask.

References:
    Zhuang et al., On Optimizing the Communication of Model Parallelism (MLSys 2023).
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from shardkit.cells import merge
from shardkit.errors import LostStateError, PartitionError
from shardkit.layout import Box, Layout
from shardkit.listing import Parcel, list_parcels, offered_by, wanted_by
from shardkit.places import Medium
from shardkit.router import Router
from shardkit.routes import Route
from shardkit.senders import Cost
from shardkit.totals import Load, Totals, add_up

__all__ = ["Transfer", "TransferPlan", "plan_transfer"]

_MAX_CACHED = 1 << 12
Layouts = Layout | Mapping[str, Layout]


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """A box of one leaf that goes from one place to another, or stays.

    Attributes:
        path: The leaf.
        box: Global logical indices.
        source: The id of the place it comes from.
        source_index: Which of the plan's sources that place belongs to.
        medium: What the source is made of.
        target: The id of the place it goes to.
        cost: Up to `Cost.SAME_DEVICE`, nothing moves.
        num_bytes: The size of the box.
        is_whole: Whether the source's array as it is, padding included, is the array
            that the target is to hold.
    """

    path: str
    box: Box
    source: int
    source_index: int
    medium: Medium
    target: int
    cost: Cost
    num_bytes: int
    is_whole: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Leaf:
    route: Route
    # The leaf's dims that the route is about.
    dims: tuple[int, ...]
    # What leaves share that differ in nothing but their name and their turn.
    alike: int
    load: Load


class TransferPlan:
    """The transfers that take a tree of leaves from its sources to its targets.

    Attributes:
        sources: As given to `plan_transfer`.
        target: As given; a leaf that came without a path has the path "".
        missing: Leaf → the boxes of it that no living place has.
    """

    def __init__(
        self,
        sources: Sequence[Mapping[str, Layout]],
        target: Mapping[str, Layout],
        lost: frozenset[int],
        lost_hosts: frozenset[int],
    ) -> None:
        self.sources, self.target = tuple(sources), target
        self._router = Router([*sources, target], lost, lost_hosts)
        kinds: dict[object, int] = {}
        order: collections.Counter[object] = collections.Counter()
        self._leaves: dict[str, _Leaf] = {}
        # Many leaves share their layouts, and are looked at once.
        known: dict[object, tuple[Route, tuple[int, ...], int, int]] = {}
        for path, layout in target.items():
            found = [(i, tree[path]) for i, tree in enumerate(sources) if path in tree]
            key = id(layout), *((i, id(x)) for i, x in found)
            if key not in known:
                known[key] = self._look_at(found, layout, kinds)
            route, dims, unit, alike = known[key]
            # Leaves of one kind go around equal senders, each kind from another start.
            turn = kinds.setdefault((route, unit), len(kinds)) + order[route, unit]
            order[route, unit] += 1
            self._leaves[path] = _Leaf(route, dims, alike, Load(unit, turn))
        self._listed: dict[object, list[Parcel]] = {}
        self.missing: dict[str, list[Box]] = self._find_missing()

    def _look_at(
        self,
        found: Sequence[tuple[int, Layout]],
        target: Layout,
        kinds: dict[object, int],
    ) -> tuple[Route, tuple[int, ...], int, int]:
        """What is the same for all leaves with these layouts."""
        route, dims = self._router.find(found, target)
        unit = target.itemsize * math.prod(
            n for dim, n in enumerate(target.shape) if dim not in dims
        )
        cuts = tuple((i, x.cuts) for i, x in found)
        alike = route, target.shape, target.itemsize, target.cuts, cuts
        return route, dims, unit, kinds.setdefault(alike, len(kinds))

    def _find_missing(self) -> dict[str, list[Box]]:
        boxes: dict[Route, list[Box]] = {}
        for route in self._router.routes:
            if self._router.has_losses or not route.levels:
                cells = route.missing()
                boxes[route] = merge([cells.box(i) for i in range(len(cells.volume))])
        return {
            path: [self._expand(path, box) for box in boxes[leaf.route]]
            for path, leaf in self._leaves.items()
            if boxes.get(leaf.route) and leaf.load.unit_bytes
        }

    def _expand(self, path: str, box: Box) -> Box:
        """Adds the dims that nobody cuts."""
        full = [(0, size) for size in self.target[path].shape]
        for dim, interval in zip(self._leaves[path].dims, box, strict=True):
            full[dim] = interval
        return tuple(full)

    @functools.cached_property
    def totals(self) -> Totals:
        """All bytes of the plan; computed when first asked for."""
        loads: dict[Route, list[Load]] = {r: [] for r in self._router.routes}
        for leaf in self._leaves.values():
            if leaf.load.unit_bytes:
                loads[leaf.route].append(leaf.load)
        return add_up(loads.items())

    def pieces(self, path: str, target: int) -> list[Transfer]:
        """All that makes up one target's shard of a leaf, what it has included."""
        return list(self._transfers(path, target, None))

    def kind(self, path: str) -> object:
        """What leaves share whose pieces are the same but for their names."""
        leaf = self._leaves[path]
        return leaf.alike, leaf.load.turn % leaf.route.period

    def for_target(
        self, target: int, paths: Iterable[str] | None = None
    ) -> Iterator[Transfer]:
        """Lists what moves to one target, leaf by leaf."""
        return self._moving(target, None, paths)

    def from_source(
        self,
        source: int,
        medium: Medium = Medium.DEVICE,
        paths: Iterable[str] | None = None,
    ) -> Iterator[Transfer]:
        """Lists what one source sends to others, leaf by leaf."""
        return self._moving(source, medium, paths)

    def _moving(
        self, place: int, medium: Medium | None, paths: Iterable[str] | None
    ) -> Iterator[Transfer]:
        """Lists what moves to a target, or from a source on a medium."""
        for path in self._leaves if paths is None else paths:
            for transfer in self._transfers(path, place, medium):
                if transfer.cost > Cost.SAME_DEVICE:
                    yield transfer

    def _transfers(
        self, path: str, place: int, medium: Medium | None
    ) -> Iterator[Transfer]:
        """Lists what a target wants, or a source on a medium is asked for."""
        leaf = self._leaves[path]
        unit = leaf.load.unit_bytes
        for parcel in self._parcels(leaf, place, medium) if unit else ():
            yield Transfer(
                path,
                self._expand(path, parcel.box),
                parcel.source,
                parcel.source_index,
                parcel.medium,
                parcel.target,
                parcel.cost,
                unit * parcel.volume,
                parcel.is_whole,
            )

    def _parcels(self, leaf: _Leaf, place: int, medium: Medium | None) -> list[Parcel]:
        route = leaf.route
        key = route, place, medium, leaf.load.turn % route.period
        if key not in self._listed:
            if len(self._listed) >= _MAX_CACHED:
                self._listed.clear()
            if medium is None:
                requests = wanted_by(route, place)
            else:
                requests = offered_by(route, place, medium)
            self._listed[key] = list_parcels(route, requests, leaf.load.turn)
        return self._listed[key]


def plan_transfer(
    sources: Sequence[Layouts],
    target: Layouts,
    *,
    lost: frozenset[int] = frozenset(),
    lost_hosts: frozenset[int] = frozenset(),
    partial: bool = False,
) -> TransferPlan:
    """Plans how leaves get from where they are to where they are wanted.

    Args:
        sources: Where the leaves are: a layout for one leaf, or a mapping from paths
            for many, in which leaves may be absent. Of two sources that ask the same,
            the first is taken.
        target: Where they are wanted, likewise.
        lost: Ids of devices whose memory is gone.
        lost_hosts: Hosts of which devices, memory and disks are gone.
        partial: Lets parts be missing; they are in `TransferPlan.missing`.

    Raises:
        LostStateError: If parts of some leaves are nowhere, naming leaves and boxes.
        PartitionError: If a leaf has another shape or itemsize in a source than in
            the target, or the targets are on different media.

    Example:
        >>> from shardkit.places import Places
        >>> leaf = Layout(Places(("fsdp",), [0, 1, 2], 0), (6,), 4, (("fsdp",),))
        >>> new = Layout(Places(("fsdp",), [0, 1], 0), (6,), 4, (("fsdp",),))
        >>> plan = plan_transfer([leaf], new)
        >>> [(t.source, t.box) for t in plan.for_target(1)]
        [(2, ((4, 6),))]
        >>> plan.totals.bytes_moved
        12
    """
    trees = [{"": x} if isinstance(x, Layout) else x for x in (*sources, target)]
    *given, wanted = trees
    _check(given, wanted)
    plan = TransferPlan(given, wanted, frozenset(lost), frozenset(lost_hosts))
    if plan.missing and not partial:
        parts = [f"{path} {list(b)}" for path, bs in plan.missing.items() for b in bs]
        raise LostStateError(
            f"{len(parts)} parts of {len(plan.missing)} leaves are on no device, host "
            f"or disk that is left: {'; '.join(parts[:5])}"
            + ("; …" if len(parts) > 5 else "")
            + f" (lost: {len(lost)} devices {sorted(lost)[:8]}, "
            f"{len(lost_hosts)} hosts {sorted(lost_hosts)[:8]}). Go on from a "
            "checkpoint, or keep replicas (data > 1)."
        )
    return plan


def _check(
    sources: Sequence[Mapping[str, Layout]], target: Mapping[str, Layout]
) -> None:
    wrong = [
        f"{path}: {source[path].shape} of {source[path].itemsize} bytes, wanted "
        f"{layout.shape} of {layout.itemsize} bytes"
        for path, layout in target.items()
        for source in sources
        if path in source
        and (source[path].shape, source[path].itemsize)
        != (layout.shape, layout.itemsize)
    ]
    if wrong:
        raise PartitionError(
            f"{len(wrong)} leaves differ between a source and the target; give the "
            f"logical shapes. {'; '.join(wrong[:5])}"
        )
    media = {layout.places.medium.name for layout in target.values()}
    if len(media) > 1:
        raise PartitionError(
            f"the targets of a plan are on one medium, found {sorted(media)}. Make a "
            "plan for each."
        )
