"""What leaves have in common that go the same way, and in which waves they go.

Owns `Kind`, a transfer plan's pieces in the indices of the arrays on the devices, and
the waves: leaves that are on their way together. Invariant: while a wave is under way
no device holds more than the larger of what it holds before and after all of them,
and the limit. It copies nothing.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from shardkit.errors import ConfigError
from shardkit.layout import Box
from shardkit.senders import Cost
from shardkit.transfer import TransferPlan

__all__ = ["Kind", "Part", "kinds_of", "waves"]

_USUAL_SCRATCH_BYTES = 2 << 30
_MAX_SMALL_BYTES = 8 << 20
ByDevice = Int[np.ndarray, " devices"]


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A box that a device takes from a shard.

    Attributes:
        source: The id of the device that has the shard.
        box: Where it lies in the shard.
        offset: Where it begins in the piece that it becomes a part of.
        is_whole: Whether shard and piece are the same, padding included.
        stays: Whether the piece is on the device that has the shard.
    """

    source: int
    box: Box
    offset: tuple[int, ...]
    is_whole: bool
    stays: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the box."""
        return tuple(stop - start for start, stop in self.box)


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """Leaves of one shape and dtype that are cut alike, before and after.

    Attributes:
        shape: The physical shape of the leaf at its target.
        piece_shape: That of every piece.
        shard_shape: That of every shard of the source.
        dtype: The dtype.
        sources: The ids of the source's devices.
        parts: The id of a target's device → what its piece is made of; nothing, where
            the piece is all padding.
    """

    shape: tuple[int, ...]
    piece_shape: tuple[int, ...]
    shard_shape: tuple[int, ...]
    dtype: Any
    sources: tuple[int, ...]
    parts: dict[int, tuple[Part, ...]]

    @functools.cached_property
    def is_small(self) -> bool:
        """Whether the pieces of many leaves are better sent as one array."""
        return self.piece_bytes <= _MAX_SMALL_BYTES

    @functools.cached_property
    def piece_bytes(self) -> int:
        """The bytes of every piece."""
        return math.prod(self.piece_shape) * self.dtype.itemsize

    def is_cut(self, part: Part, packed: bool) -> bool:
        """Whether what a device sends is not its shard itself."""
        return not part.stays and (packed or part.shape != self.shard_shape)

    def cuts(self, packed: bool) -> dict[int, tuple[Box, ...]]:
        """The id of a source → the boxes that are cut from its shard, to be sent."""
        found: dict[int, dict[Box, None]] = {}
        for part in itertools.chain(*self.parts.values()):
            if self.is_cut(part, packed):
                found.setdefault(part.source, {})[part.box] = None
        return {source: tuple(boxes) for source, boxes in found.items()}

    def is_kept(self, id: int, keep_source: bool) -> bool:
        """Whether a device goes on with the very shard that it has."""
        parts = self.parts.get(id, ())
        return not keep_source and [p.stays and p.is_whole for p in parts] == [True]

    def held_before(self, ids: Sequence[int]) -> ByDevice:
        """The bytes that each device holds before."""
        size = math.prod(self.shard_shape) * self.dtype.itemsize
        return np.array([size * (id in self.sources) for id in ids], np.int64)

    def held_after(self, ids: Sequence[int]) -> ByDevice:
        """The bytes that each device holds afterwards."""
        return np.array([self.piece_bytes * (id in self.parts) for id in ids], np.int64)

    def added(self, ids: Sequence[int], *, keep_source: bool, packed: bool) -> ByDevice:
        """The bytes that each device holds besides, while a leaf is on its way."""
        cuts = self.cuts(packed)
        return np.array(
            [
                self.dtype.itemsize
                * (sum(map(_volume, cuts.get(id, ()))) + self._arriving(id, packed))
                + (id in self.parts and not self.is_kept(id, keep_source))
                * self.piece_bytes
                for id in ids
            ],
            np.int64,
        )

    def _arriving(self, id: int, packed: bool) -> int:
        """The elements that arrive at a device and are not yet its piece."""
        parts = self.parts.get(id, ())
        if not packed and len(parts) == 1 and parts[0].is_whole:
            return 0
        return sum(_volume(part.box) for part in parts if not part.stays)


def _volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def kinds_of(plan: TransferPlan, dtypes: dict[str, Any]) -> dict[str, Kind]:
    """Finds the kind of every leaf of a plan whose first source is on devices."""
    known: dict[Any, Kind] = {}
    found = {}
    for path, dtype in dtypes.items():
        key = dtype, plan.kind(path)
        if key not in known:
            known[key] = _kind(plan, path, dtype)
        found[path] = known[key]
    return found


def _kind(plan: TransferPlan, path: str, dtype: Any) -> Kind:
    source, target = plan.sources[0][path], plan.target[path]
    parts = {}
    for id in target.places.ids.ravel().tolist():
        parts[id] = tuple(
            Part(
                t.source,
                tuple((s.start, s.stop) for s in source.slices(t.source, t.box)),
                tuple(s.start for s in target.slices(id, t.box)),
                t.is_whole,
                t.cost <= Cost.SAME_DEVICE,
            )
            for t in plan.pieces(path, id)
        )
    piece = target.piece_shape
    return Kind(
        tuple(map(math.prod, zip(piece, target.counts, strict=True))),
        piece,
        source.piece_shape,
        np.dtype(dtype),
        tuple(source.places.ids.ravel().tolist()),
        parts,
    )


def waves(
    kinds: dict[str, Kind], *, keep_source: bool, limit_bytes: int | None
) -> Iterator[list[str]]:
    """Groups leaves that may be on their way together.

    Args:
        kinds: Path → kind.
        keep_source: Whether the shards stay.
        limit_bytes: How much more a device may hold than before or after; None for
            what keeps the devices busy.

    Raises:
        ConfigError: If the limit cannot be kept, naming the least that can.
    """
    ids = sorted({id for kind in kinds.values() for id in (*kind.sources, *kind.parts)})
    numbers = {
        kind: (
            kind.held_after(ids) - (0 if keep_source else kind.held_before(ids)),
            kind.added(ids, keep_source=keep_source, packed=False),
            kind.added(ids, keep_source=keep_source, packed=kind.is_small),
        )
        for kind in dict.fromkeys(kinds.values())
    }
    # What shrinks goes first, so that what is held never exceeds both ends.
    ranked = sorted(numbers, key=lambda kind: int(numbers[kind][0].max(initial=0)))
    rank = {kind: at for at, kind in enumerate(ranked)}
    order = sorted(kinds, key=lambda path: rank[kinds[path]])
    change = sum(
        (numbers[kind][0] for kind in kinds.values()), np.zeros(len(ids), np.int64)
    )
    ends = np.maximum(change, 0)
    least = _least(order, kinds, numbers, ends)
    if limit_bytes is not None and limit_bytes < least:
        raise ConfigError(
            f"scratch_bytes: this move needs {least} bytes on some device besides what "
            f"it holds before or after, found {limit_bytes}. Give it at least {least}."
        )
    if limit_bytes is None:
        limit_bytes = max(least, _USUAL_SCRATCH_BYTES)
    return _grouped(order, kinds, numbers, ends + limit_bytes)


def _least(
    order: Iterable[str], kinds: dict[str, Kind], numbers: Any, ends: ByDevice
) -> int:
    """The least limit with which leaves can go one by one."""
    held = np.zeros_like(ends)
    least = max((kind.piece_bytes for kind in numbers), default=0)
    for path in order:
        change, added, _ = numbers[kinds[path]]
        least = max(least, int((held + added - ends).max(initial=0)))
        held = held + change
    return least


def _grouped(
    order: Iterable[str], kinds: dict[str, Kind], numbers: Any, bound: ByDevice
) -> Iterator[list[str]]:
    held, on_way = np.zeros_like(bound), np.zeros_like(bound)
    settled = held
    wave: list[str] = []
    for path in order:
        change, _, added = numbers[kinds[path]]
        if wave and (settled + on_way + added > bound).any():
            yield wave
            wave, settled, on_way = [], held, np.zeros_like(bound)
        wave.append(path)
        held, on_way = held + change, on_way + added
    if wave:
        yield wave
