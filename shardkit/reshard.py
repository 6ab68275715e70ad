"""Moves live arrays from one mesh to another.

Owns the carrying out of `layout.plan_pieces`: a piece that is one whole source shard
is copied device to device, any other is put together in host memory. Invariant: the
logical array is the same before and after, to the bit. It decides nothing.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from shardkit.errors import LostStateError
from shardkit.layout import SHARD_AXIS, LeafLayout, Piece, plan_pieces

__all__ = ["Moved", "from_host", "reshard", "to_host"]


@dataclasses.dataclass(frozen=True)
class Moved:
    """The arrays where they now are.

    Attributes:
        tree: The state on the new mesh.
        bytes_moved: What went from one device to another.
    """

    tree: Any
    bytes_moved: int


def reshard(
    tree: Any,
    layout: Any,
    old: Mesh,
    new: Mesh,
    *,
    lost: frozenset[int] = frozenset(),
    keep_source: bool = False,
) -> Moved:
    """Copies a state to another mesh.

    Args:
        tree: Arrays as they lie on `old`.
        layout: A tree of `LeafLayout`.
        old: Where they are.
        new: Where they go.
        lost: Ids of devices whose memory is gone.
        keep_source: Whether the source is still to be used, so that no memory may
            be shared with it.

    Raises:
        LostStateError: Naming all leaves of which a part survives nowhere.
    """
    leaves, treedef = jax.tree.flatten(tree)
    layouts: list[LeafLayout] = jax.tree.leaves(layout)
    plans = [plan_pieces(leaf, old, new, lost) for leaf in layouts]
    missing = [
        leaf.path
        for array, leaf, plan in zip(leaves, layouts, plans, strict=True)
        # Over several processes all shards travel, so none may be missing.
        if plan is None or (lost and not array.is_fully_addressable)
    ]
    if missing:
        is_local = all(array.is_fully_addressable for array in leaves)
        raise LostStateError(
            f"the shards of {len(missing)} leaves went with devices {sorted(lost)} and "
            + ("no replica is left: " if is_local else "replicas cannot be reached: ")
            + ", ".join(missing[:5])
            + (", …" if len(missing) > 5 else "")
            + ". Go on from a checkpoint"
            + (", or keep replicas (data > 1)." if is_local else ".")
        )
    moved, total = [], 0
    for array, leaf, plan in zip(leaves, layouts, plans, strict=True):
        assert plan is not None
        if array.is_fully_addressable:
            out, num_bytes = _move(array, leaf, plan, old, new, not keep_source)
        else:
            out, num_bytes = _move_through_hosts(array, leaf, new)
        moved.append(out)
        total += num_bytes
    return Moved(treedef.unflatten(moved), total)


def _move(
    array: Array,
    leaf: LeafLayout,
    plan: dict[Any, list[Piece]],
    old: Mesh,
    new: Mesh,
    may_alias: bool,
) -> tuple[Array, int]:
    shards = {shard.device: shard.data for shard in array.addressable_shards}
    shape = leaf.physical_shape(new.shape[SHARD_AXIS])
    row_bytes = array.nbytes if leaf.dim < 0 else array.nbytes // array.shape[leaf.dim]
    held, out, num_bytes = _starts(leaf, old), [], 0
    for target, pieces in plan.items():
        for piece in pieces:
            if piece.source != target:
                rows = 1 if leaf.dim < 0 else piece.stop - piece.start
                num_bytes += rows * row_bytes
        if leaf.dim < 0:
            shard = shards[pieces[0].source]
            out.append(jax.device_put(shard, target, may_alias=may_alias))
            continue
        size = shape[leaf.dim] // new.shape[SHARD_AXIS]
        out.append(_assemble(leaf, pieces, shards, held, size, target, may_alias))
    sharding = leaf.sharding(new)
    return jax.make_array_from_single_device_arrays(shape, sharding, out), num_bytes


def _starts(leaf: LeafLayout, mesh: Mesh) -> dict[Any, int]:
    """Where the piece that each device holds begins."""
    if leaf.dim < 0:
        return {}
    count = mesh.shape[SHARD_AXIS]
    axis = mesh.axis_names.index(SHARD_AXIS)
    return {
        device: leaf.interval(index[axis], count)[0]
        for index, device in np.ndenumerate(mesh.devices)
    }


def _assemble(
    leaf: LeafLayout,
    pieces: list[Piece],
    shards: dict[Any, Array],
    held: dict[Any, int],
    size: int,
    target: Any,
    may_alias: bool,
) -> Array:
    """Puts one target piece of `size` rows together, zeros where there is padding."""
    if len(pieces) == 1:
        [piece] = pieces
        shard = shards[piece.source]
        if held[piece.source] == piece.start and shard.shape[leaf.dim] == size:
            return jax.device_put(shard, target, may_alias=may_alias)
    shape = (*leaf.shape[: leaf.dim], size, *leaf.shape[leaf.dim + 1 :])
    whole = np.zeros(shape, leaf.dtype)
    prefix = (slice(None),) * leaf.dim
    first = pieces[0].start if pieces else 0
    for piece in pieces:
        offset = held[piece.source]
        rows = slice(piece.start - offset, piece.stop - offset)
        whole[(*prefix, slice(piece.start - first, piece.stop - first))] = np.asarray(
            shards[piece.source]
        )[(*prefix, rows)]
    # An array that borrows numpy's memory could not be donated later.
    return jax.device_put(whole, target, may_alias=False)


def _move_through_hosts(array: Array, leaf: LeafLayout, new: Mesh) -> tuple[Array, int]:
    """The way for arrays of several processes: every process sees the whole leaf."""
    whole = to_host(array, leaf)
    return from_host(whole, leaf, new), whole.nbytes


def to_host(array: Array, leaf: LeafLayout) -> np.ndarray:
    """Copies the logical array to the memory of every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        whole = np.asarray(array)
    else:
        from jax.experimental import multihost_utils

        whole = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(whole)[tuple(slice(0, size) for size in leaf.shape)]


def from_host(whole: np.ndarray, leaf: LeafLayout, mesh: Mesh) -> Array:
    """Places a logical array that every process has on a mesh."""
    shape = leaf.physical_shape(mesh.shape[SHARD_AXIS])
    pad = [(0, a - b) for a, b in zip(shape, leaf.shape, strict=True)]
    whole = np.pad(whole, pad) if any(after for _, after in pad) else whole
    sharding = leaf.sharding(mesh)
    pieces = [
        jax.device_put(whole[index], device, may_alias=False)
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)
