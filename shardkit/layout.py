"""Which place holds which box of a leaf.

Owns `LeafLayout`: the logical shape of a leaf, the dims that may be cut, and what
follows from them on a given mesh; and `Layout`: any cutting of a leaf over any grid
of devices, host copies or files. Invariant: boxes are in *logical* indices, so the
padding that makes pieces equal is never part of one. Pure: no device is touched.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardkit.errors import PartitionError
from shardkit.mesh import exchange_axes, group_size
from shardkit.places import Medium, Places
from shardkit.shards import Shards

__all__ = ["SHARD_AXIS", "Box", "Layout", "LeafLayout", "state_shards"]

Box = tuple[tuple[int, int], ...]
"""A box of global indices: `(start, stop)` for every dim."""

SHARD_AXIS = "fsdp"
"""The mesh axis along which state is cut, with padding where it must be.

The axes of a group (`mesh.GROUP_AXES`) cut it too, but only dims that they divide: what
they cut is the compiler's, which pads by itself within a program."""


@dataclasses.dataclass(frozen=True)
class LeafLayout:
    """One leaf, apart from any mesh.

    Attributes:
        path: Where it is in the state.
        shape: Its logical (global, unpadded) shape.
        dtype: Its dtype.
        dim: The dim that is cut along `fsdp`; -1 for none.
        axes: The logical axis of every dim, for information; None if not annotated.
        group: The axes of a group that cut it where they divide it, and which dim each
            of them cuts: `(axis, dim)`.

    Example:
        >>> leaf = LeafLayout("w", (5, 4), np.dtype("float32"), 0)
        >>> leaf.physical_shape(2), leaf.interval(1, 2)
        ((6, 4), (3, 5))
        >>> leaf = dataclasses.replace(leaf, group=(("tensor", 1),))
        >>> tuple(leaf.spec_on({"fsdp": 2, "tensor": 2}))
        ('fsdp', 'tensor')
        >>> leaf.group_on({"fsdp": 2, "tensor": 3})
        ()
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    dim: int = -1
    axes: tuple[str | None, ...] | None = dataclasses.field(default=None, compare=False)
    group: tuple[tuple[str, int], ...] = ()

    @property
    def kind(self) -> Any:
        """Leaves of one kind are alike on every mesh."""
        return self.shape, self.dtype, self.dim, self.group

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """The logical array, abstractly."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    @property
    def spec(self) -> PartitionSpec:
        """How `fsdp` cuts it on any mesh."""
        if self.dim < 0:
            return PartitionSpec()
        return PartitionSpec(*[None] * self.dim, SHARD_AXIS)

    def group_on(self, sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
        """What of `group` cuts it, where axes have these sizes (absent ones 1)."""
        counts = ((axis, dim, sizes.get(axis, 1)) for axis, dim in self.group)
        return tuple(
            (axis, dim) for axis, dim, n in counts if n > 1 and not self.shape[dim] % n
        )

    def spec_on(
        self, sizes: Mapping[str, int], *, gathered: bool = False
    ) -> PartitionSpec:
        """How it is cut, where mesh axes have these sizes; `gathered` along `fsdp`."""
        cuts = {dim: axis for axis, dim in self.group_on(sizes)}
        if not cuts:
            return PartitionSpec() if gathered else self.spec
        if self.dim >= 0 and not gathered:
            cuts[self.dim] = SHARD_AXIS
        return PartitionSpec(*map(cuts.get, range(len(self.shape))))

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """Where its pieces are on `mesh`."""
        return NamedSharding(mesh, self.spec_on(mesh.shape))

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
        """Physical bytes on each device of a mesh that `fsdp` alone cuts."""
        total = math.prod(self.physical_shape(count)) * np.dtype(self.dtype).itemsize
        return total if self.dim < 0 else total // count


@dataclasses.dataclass(frozen=True)
class Layout:
    """One leaf on a grid of places: which box each of them holds.

    Every dim is cut by the axes in its entry of `cuts`, the first of them the slowest,
    into pieces of ceil(size / count); the last ones may hold less, or nothing. Places
    that differ only along other axes hold the same. Nothing is listed.

    Attributes:
        places: The grid.
        shape: The logical shape of the leaf.
        itemsize: Bytes per element.
        cuts: For every dim the axes of the grid that cut it.

    Raises:
        PartitionError: If the cuts do not fit the shape or the grid.

    Example:
        >>> grid = Places(("fsdp", "tensor"), [[0, 1], [2, 3]], 0)
        >>> layout = Layout(grid, (5, 8), 4, (("fsdp",), ("tensor",)))
        >>> layout.box(3), layout.piece_shape
        (((3, 5), (4, 8)), (3, 4))
    """

    places: Places
    shape: tuple[int, ...]
    itemsize: int
    cuts: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        axes = [axis for cut in self.cuts for axis in cut]
        unknown = [axis for axis in axes if axis not in self.places.axes]
        if len(self.cuts) != len(self.shape) or unknown or len(set(axes)) < len(axes):
            raise PartitionError(
                f"a leaf of shape {self.shape} is cut by different axes of "
                f"{self.places.axes}, one group per dim; found {self.cuts}."
            )

    @classmethod
    def of_spec(
        cls, places: Places, spec: Any, shape: tuple[int, ...], dtype: Any
    ) -> "Layout":
        """A leaf cut as a `PartitionSpec` says, which may be shorter than the shape."""
        entries = [*spec, *[None] * (len(shape) - len(spec))]
        cuts = tuple(
            () if e is None else (e,) if isinstance(e, str) else tuple(e)
            for e in entries
        )
        return cls(places, tuple(shape), _itemsize(dtype), cuts)

    @classmethod
    def of_sharding(
        cls,
        sharding: Any,
        shape: tuple[int, ...],
        dtype: Any,
        places: Places | None = None,
    ) -> "Layout":
        """A leaf as a sharding lays it out.

        Args:
            sharding: A `NamedSharding`, or any sharding that cuts nothing.
            shape: The logical shape; what the mesh does not divide is padded.
            dtype: The dtype, of arrays or of keys.
            places: The mesh's places, to be shared by many leaves.
        """
        if isinstance(sharding, NamedSharding):
            places = places or Places.of_mesh(sharding.mesh)
            return cls.of_spec(places, sharding.spec, shape, dtype)
        if not sharding.is_fully_replicated:
            raise PartitionError(
                f"{sharding} cuts a leaf of shape {shape} and is no NamedSharding. "
                "Place the array with one."
            )
        hosts = {device.id: device.process_index for device in sharding.device_set}
        ids = sorted(hosts)
        on = places or Places.listed(ids, [hosts[id] for id in ids], Medium.DEVICE)
        return cls.whole(on, shape, dtype)

    @classmethod
    def of_leaf(cls, leaf: LeafLayout, places: Places) -> "Layout":
        """A leaf of the state on the places of a mesh that has an `fsdp` axis."""
        spec = leaf.spec_on(places.axis_sizes)
        return cls.of_spec(places, spec, leaf.shape, leaf.dtype)

    @classmethod
    def whole(cls, places: Places, shape: tuple[int, ...], dtype: Any) -> "Layout":
        """All of a leaf at every one of these places."""
        return cls.of_spec(places, (), shape, dtype)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of pieces along each dim."""
        sizes = self.places.axis_sizes
        return tuple(math.prod(sizes[axis] for axis in cut) for cut in self.cuts)

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """The physical shape of every piece, padding included."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.counts, strict=True))

    @property
    def num_bytes(self) -> int:
        """The logical bytes of the leaf, once."""
        return math.prod(self.shape) * self.itemsize

    @property
    def piece_bytes(self) -> int:
        """The physical bytes at every place."""
        return math.prod(self.piece_shape) * self.itemsize

    def box(self, id: int) -> Box:
        """What the place `id` holds; empty where it holds padding only."""
        where = np.unravel_index(self.places.slots[id], self.places.ids.shape)
        coords = dict(zip(self.places.axes, where, strict=True))
        sizes, box = self.places.axis_sizes, []
        for size, cut, piece in zip(
            self.shape, self.cuts, self.piece_shape, strict=True
        ):
            index = 0
            for axis in cut:
                index = index * sizes[axis] + int(coords[axis])
            box.append((min(index * piece, size), min((index + 1) * piece, size)))
        return tuple(box)

    def slices(self, id: int, box: Box) -> tuple[slice, ...]:
        """Where a box lies inside the array at the place `id`."""
        starts = [start for start, _ in self.box(id)]
        return tuple(
            slice(a - start, b - start)
            for (a, b), start in zip(box, starts, strict=True)
        )


def _itemsize(dtype: Any) -> int:
    """Bytes per element; dtypes of keys are unknown to numpy."""
    size = getattr(dtype, "itemsize", None)
    return size if isinstance(size, int) else np.dtype(dtype).itemsize


def state_shards(mesh: Mesh, *, exact: bool = True) -> Shards:
    """How state is cut on `mesh`, for use inside `shard_map`."""
    axis = SHARD_AXIS if SHARD_AXIS in exchange_axes(mesh) else None
    return Shards(axis, mesh.shape[SHARD_AXIS], exact, group_size(mesh.shape) > 1)
