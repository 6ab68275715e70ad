"""Digests of the blocks of live arrays, wherever their shards are.

Owns the one program that computes them, which asks no other device for anything and
may therefore run beside a step, and the adding up of what the shards know. Invariant:
the result does not depend on the sharding.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from shardkit.blocks import Blocks
from shardkit.checkpoint.manifest import LeafRecord, Manifest
from shardkit.digest import combine_digests, shard_digests
from shardkit.errors import DamagedError
from shardkit.keys import raw
from shardkit.layout import LeafLayout

__all__ = ["BlockSums", "BlockTable", "held", "hex_lanes", "manifest_of"]


def held(array: Array) -> Callable[[], Array]:
    """Holds on to what an array now is, whatever becomes of the array.

    Where the devices are CPUs this copies nothing: a program that is to use up memory
    which numpy sees takes other memory. To be used where digests are not to hold up
    the step, as CPUs do not run programs beside it.

    Returns:
        What makes the array again, without a copy; keys as their words.
    """
    array = raw(array)
    shape, sharding = array.shape, array.sharding
    pieces = {str(x.index): np.asarray(x.data) for x in array.addressable_shards}
    return lambda: jax.make_array_from_callback(
        shape, sharding, lambda index: pieces[str(index)]
    )


class BlockSums:
    """The digests of all blocks of some leaves, on their way.

    Args:
        leaves: Layout and physical array of each. Nobody waits for the arrays here,
            and they may be given up afterwards.
    """

    def __init__(self, leaves: Iterable[tuple[LeafLayout, Array]] = ()) -> None:
        self._leaves = [_Leaf(leaf, array) for leaf, array in leaves]
        self._shared: list[np.ndarray] | None = None

    def add(self, leaf: LeafLayout, array: Array) -> None:
        """Takes one more."""
        self._leaves.append(_Leaf(leaf, array))

    def share(self) -> None:
        """Adds up what several processes know; every one of them must call it."""
        if jax.process_count() == 1:
            return
        from jax.experimental import multihost_utils

        tables = [leaf.table() for leaf in self._leaves]
        mine = np.concatenate([table.reshape(-1) for table in tables])
        every = np.asarray(multihost_utils.process_allgather(mine))
        total = every.sum(axis=0, dtype=np.uint32)
        ends = np.cumsum([table.size for table in tables])[:-1]
        parts = zip(np.split(total, ends), tables, strict=True)
        self._shared = [part.reshape(table.shape) for part, table in parts]

    def result(self) -> dict[str, np.ndarray]:
        """Waits for the digests: path → `uint32 [blocks, 4]`, in row-major order."""
        tables = self._shared or [leaf.table() for leaf in self._leaves]
        return {
            leaf.path: table for leaf, table in zip(self._leaves, tables, strict=True)
        }


def hex_lanes(table: np.ndarray) -> tuple[str, ...]:
    """Spells `uint32 [blocks, 4]` as 32 hex digits a block."""
    return tuple("".join(f"{int(lane):08x}" for lane in row) for row in table)


def manifest_of(
    step: int,
    leaves: Sequence[LeafLayout],
    tables: Mapping[str, np.ndarray],
    **facts: Any,
) -> Manifest:
    """Says of leaves what they are, with the digests of their blocks.

    Args:
        step: How many steps were done.
        leaves: The layouts; of random keys the keys', not their words'.
        tables: Path → `uint32 [blocks, 4]`.
        **facts: The other fields of `Manifest`.
    """
    digests = {
        path: table.sum(axis=0, dtype=np.uint32) for path, table in tables.items()
    }
    return Manifest(
        step=step,
        digest=combine_digests(digests, leaves),
        leaves={
            leaf.path: LeafRecord(
                leaf.shape, str(leaf.dtype), hex_lanes(tables[leaf.path]), leaf.axes
            )
            for leaf in leaves
        },
        **facts,
    )


class _Leaf:
    """The sums of one leaf; it holds on to them alone."""

    def __init__(self, leaf: LeafLayout, array: Array) -> None:
        self.path = leaf.path
        array = raw(array)
        shape = (*leaf.shape, *array.shape[len(leaf.shape) :])
        self._blocks = blocks = Blocks.of(shape, array.dtype.itemsize)
        self._sums, self._piece = None, 0
        if array.size == 0:
            return
        # Programs are kept by what they compute, which the path is not part of.
        stored = LeafLayout("", shape, array.dtype)
        sharding = array.sharding
        cuts: tuple[tuple[str, ...], ...] = ((),) * array.ndim
        mesh = None
        if isinstance(sharding, NamedSharding):
            mesh = sharding.mesh
            cuts = tuple(_axes(entry) for entry in sharding.spec)
            cuts += ((),) * (array.ndim - len(cuts))
        elif len(sharding.device_set) > 1:
            array = jax.device_put(array, min(sharding.device_set, key=lambda d: d.id))
        self._sums = _digest(array, stored, blocks, mesh, cuts)
        if blocks.dim >= 0:
            self._piece = sharding.shard_shape(array.shape)[blocks.dim]

    def table(self) -> np.ndarray:
        """Adds up what the shards of this process know: `uint32 [blocks, 4]`."""
        table = BlockTable(self._blocks)
        seen: dict[str, np.ndarray] = {}
        for shard in self._sums.addressable_shards if self._sums is not None else ():
            sums = np.asarray(shard.data)[0]
            if (sums != seen.setdefault(str(shard.index), sums)).any():
                raise DamagedError(
                    f"{self.path}: device {shard.device} holds other bits than another "
                    f"that should hold the same, {shard.index}"
                )
            if shard.replica_id == 0:
                starts = [i.start or 0 for i in shard.index[2:]]
                if starts:
                    starts[-1] = starts[-1] // sums.shape[-1] * self._piece
                table.add(sums, starts)
        return table.lanes()


class BlockTable:
    """Sums of blocks, as parts of a leaf add to them.

    Args:
        blocks: How the leaf is cut.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._table = np.zeros((4, *blocks.grid), np.uint32)

    def add(self, sums: np.ndarray, start: Sequence[int]) -> None:
        """Adds what `shard_digests` found of a part.

        Args:
            sums: `uint32 [4, …]`, by the dims of `Blocks.grid`.
            start: Where the part starts along these dims, in indices of the leaf.
        """
        first = [*start[:-1], *(i // self._blocks.chunk for i in start[-1:])]
        # What is past the end is padding, and adds nothing.
        ends = [
            max(a, min(a + size, most))
            for a, size, most in zip(
                first, sums.shape[1:], self._blocks.grid, strict=True
            )
        ]
        there = [slice(a, b) for a, b in zip(first, ends, strict=True)]
        here = [slice(0, b - a) for a, b in zip(first, ends, strict=True)]
        self._table[:, *there] += sums[:, *here]

    def lanes(self) -> np.ndarray:
        """The sums, `uint32 [blocks, 4]`, in row-major order."""
        return np.moveaxis(self._table, 0, -1).reshape(-1, 4)


def _axes(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _digest(
    array: Array,
    leaf: LeafLayout,
    blocks: Blocks,
    mesh: Any,
    cuts: tuple[tuple[str, ...], ...],
) -> Array:
    """Every device digests what it holds.

    Returns:
        `uint32 [shards, 4, …]`: the dims of `Blocks.grid`, laid out as the array's; and
        in front one for what is cut further back, whose sums are still to be added.
    """

    def digest(shard: Array) -> Array:
        start = [
            (lax.axis_index(axes) if axes else 0) * size
            for axes, size in zip(cuts, shard.shape, strict=True)
        ]
        return shard_digests(shard, jnp.array(start, jnp.int32), leaf, blocks)[None]

    if mesh is None:
        return digest(array)
    kept = cuts[: blocks.dim + 1]
    added = tuple(axis for axes in cuts[blocks.dim + 1 :] for axis in axes)
    entry = lambda axes: axes or None  # noqa: E731
    out = PartitionSpec(entry(added), None, *map(entry, kept))
    spec = PartitionSpec(*map(entry, cuts))
    return jax.shard_map(
        digest, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False
    )(array)
