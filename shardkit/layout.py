"""Which device holds which box of a leaf.

Owns `LeafLayout`: the logical shape of a leaf, the one dim that may be cut, and what
follows from them on a given mesh. Invariant: boxes are in *logical* indices, so the
padding that makes pieces equal is never part of one. Pure: no device is touched.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardkit.shards import Shards

__all__ = ["SHARD_AXIS", "LeafLayout", "Piece", "plan_pieces", "state_shards"]

SHARD_AXIS = "fsdp"
"""The mesh axis along which state is cut."""


@dataclasses.dataclass(frozen=True)
class LeafLayout:
    """One leaf, apart from any mesh.

    Attributes:
        path: Where it is in the state.
        shape: Its logical (global, unpadded) shape.
        dtype: Its dtype.
        dim: The dim that is cut along `fsdp`; -1 for none.

    Example:
        >>> leaf = LeafLayout("w", (5, 4), np.dtype("float32"), 0)
        >>> leaf.physical_shape(2), leaf.interval(1, 2)
        ((6, 4), (3, 5))
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    dim: int = -1

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """The logical array, abstractly."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    @property
    def spec(self) -> PartitionSpec:
        """The partition spec on any mesh."""
        if self.dim < 0:
            return PartitionSpec()
        return PartitionSpec(*[None] * self.dim, SHARD_AXIS)

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """Where its pieces are on `mesh`."""
        return NamedSharding(mesh, self.spec)

    def physical_shape(self, count: int) -> tuple[int, ...]:
        """The global shape including padding, cut into `count` pieces."""
        if self.dim < 0:
            return self.shape
        size = Shards(count=count).piece(self.shape[self.dim]) * count
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    def physical(self, mesh: Mesh) -> jax.ShapeDtypeStruct:
        """The array as it lies on `mesh`, abstractly."""
        shape = self.physical_shape(mesh.shape[SHARD_AXIS])
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=self.sharding(mesh))

    def is_padded(self, count: int) -> bool:
        """Whether `count` pieces need padding."""
        return self.physical_shape(count) != self.shape

    def interval(self, index: int, count: int) -> tuple[int, int]:
        """The logical range of the cut dim that piece `index` of `count` holds."""
        size = self.shape[self.dim]
        piece = Shards(count=count).piece(size)
        return min(index * piece, size), min((index + 1) * piece, size)

    def piece_bytes(self, count: int) -> int:
        """Physical bytes on each device."""
        total = math.prod(self.physical_shape(count)) * np.dtype(self.dtype).itemsize
        return total if self.dim < 0 else total // count


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a target piece: rows `[start, stop)` of the cut dim from one source."""

    source: Any
    start: int
    stop: int


def state_shards(mesh: Mesh, *, exact: bool = True) -> Shards:
    """How state is cut on `mesh`, for use inside `shard_map`."""
    return Shards(SHARD_AXIS, mesh.shape[SHARD_AXIS], exact)


def holders(leaf: LeafLayout, mesh: Mesh, lost: frozenset[int]) -> list[list[Any]]:
    """Lists, for every piece, the surviving devices that hold it."""
    axis = mesh.axis_names.index(SHARD_AXIS)
    grid = np.moveaxis(mesh.devices, axis, 0).reshape(mesh.shape[SHARD_AXIS], -1)
    if leaf.dim < 0:
        grid = grid.reshape(1, -1)
    return [[d for d in row if d.id not in lost] for row in grid]


def plan_pieces(
    leaf: LeafLayout, old: Mesh, new: Mesh, lost: frozenset[int] = frozenset()
) -> dict[Any, list[Piece]] | None:
    """Plans where every device of the new mesh takes its piece from.

    Args:
        leaf: The leaf, whose dim is cut or not on both meshes alike.
        old: Where it is.
        new: Where it goes.
        lost: Ids of devices whose memory is gone.

    Returns:
        Device → pieces in order; None if part of the leaf survives nowhere.
    """
    sources = holders(leaf, old, lost)
    count = len(sources)
    for i, devices in enumerate(sources):
        start, stop = leaf.interval(i, count) if leaf.dim >= 0 else (0, 1)
        # A piece of padding alone can be lost without a loss.
        if not devices and start < stop:
            return None
    plan: dict[Any, list[Piece]] = {}
    for index, row in enumerate(holders(leaf, new, frozenset())):
        for turn, target in enumerate(row):
            if leaf.dim < 0:
                plan[target] = [Piece(_pick(sources[0], target, turn), 0, 0)]
                continue
            low, high = leaf.interval(index, new.shape[SHARD_AXIS])
            plan[target] = []
            for i, devices in enumerate(sources):
                start, stop = leaf.interval(i, count)
                a, b = max(low, start), min(high, stop)
                if a < b:
                    source = _pick(devices, target, index + turn)
                    plan[target].append(Piece(source, a, b))
    return plan


def _pick(devices: list[Any], target: Any, turn: int) -> Any:
    """Prefers the target itself, else spreads the load over the replicas."""
    return target if target in devices else devices[turn % len(devices)]
