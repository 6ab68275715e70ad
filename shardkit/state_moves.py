"""Moves a training state, with its padding, to another mesh.

Owns the way from where a state is and where it is wanted to a plan that is carried out.
Invariant: the logical state is the same before and after, to the bit; what padding
holds is undefined. What comes from where is `transfer`'s decision, and the copies are
`carry`'s.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from shardkit import carry
from shardkit.errors import LostStateError
from shardkit.keys import is_key_dtype, raw
from shardkit.layout import SHARD_AXIS, Layout, LeafLayout
from shardkit.places import Places
from shardkit.resharding import gathered, like
from shardkit.transfer import TransferPlan, plan_transfer

__all__ = [
    "Moved",
    "compile_move",
    "from_host",
    "is_whole",
    "laid_out",
    "move_state",
    "raw_leaf",
    "to_host",
]


@dataclasses.dataclass(frozen=True)
class Moved:
    """The arrays where they now are.

    Attributes:
        tree: The state on the new mesh.
        bytes_moved: What went from one device to another.
        plan_s: The seconds until it was known what to copy, of those it took.
    """

    tree: Any
    bytes_moved: int
    plan_s: float = 0.0


def move_state(
    tree: Any,
    layout: Any,
    old: Mesh,
    new: Mesh,
    *,
    lost: frozenset[int] = frozenset(),
    keep_source: bool = False,
) -> Moved:
    """Moves a training state to another mesh.

    Args:
        tree: Arrays as they lie on `old`.
        layout: A tree of `LeafLayout`.
        old: Where they are.
        new: Where they go.
        lost: Ids of devices whose memory is gone.
        keep_source: Whether the source is still to be used, so that no memory may
            be shared with it.

    Raises:
        LostStateError: Naming leaves and parts that survive nowhere.
    """
    start_s = time.monotonic()
    leaves, treedef = jax.tree.flatten(tree)
    layouts: list[LeafLayout] = jax.tree.leaves(layout)
    if not all(array.is_fully_addressable for array in leaves):
        return Moved(*_through_hosts(leaves, layouts, treedef, new, lost))
    bare = [raw_leaf(leaf) for leaf in layouts]
    plan = _plan(bare, old, new, lost)
    plan_s = time.monotonic() - start_s
    out = carry.carry(
        plan,
        {leaf.path: raw(x) for leaf, x in zip(bare, leaves, strict=True)},
        {leaf.path: leaf.sharding(new) for leaf in bare},
        keep_source=keep_source,
    )
    moved = [like(out[leaf.path], x) for leaf, x in zip(bare, leaves, strict=True)]
    return Moved(treedef.unflatten(moved), plan.totals.bytes_moved, plan_s)


def compile_move(layout: Any, old: Mesh, new: Mesh, *, keep_source: bool) -> None:
    """Compiles the programs that `move_state` needs from one mesh to another.

    Args:
        layout: A tree of `LeafLayout`.
        old: Where the state will be.
        new: Where it will go.
        keep_source: As in `move_state`.
    """
    bare = [raw_leaf(leaf) for leaf in jax.tree.leaves(layout)]
    carry.compile_carry(
        _plan(bare, old, new, frozenset()),
        {leaf.path: leaf.dtype for leaf in bare},
        {leaf.path: leaf.sharding(new) for leaf in bare},
        old.devices.flat,
        keep_source=keep_source,
    )


def is_whole(tree: Any) -> bool:
    """Whether every shard that this process has of a tree of arrays is still there."""
    # An array of which some shards are deleted does not count as deleted itself.
    return not any(
        x.is_deleted() or any(s.data.is_deleted() for s in raw(x).addressable_shards)
        for x in jax.tree.leaves(tree)
    )


def _plan(
    layouts: list[LeafLayout], old: Mesh, new: Mesh, lost: frozenset[int]
) -> TransferPlan:
    source, target = (laid_out(layouts, Places.of_mesh(x)) for x in (old, new))
    return plan_transfer([source], target, lost=lost)


def laid_out(leaves: Sequence[LeafLayout], places: Places) -> dict[str, Layout]:
    """Layouts by path; leaves that are alike share theirs."""
    known: dict[Any, Layout] = {}
    found = {}
    for leaf in leaves:
        if leaf.kind not in known:
            known[leaf.kind] = Layout.of_leaf(leaf, places)
        found[leaf.path] = known[leaf.kind]
    return found


def _through_hosts(
    leaves: list[Array],
    layouts: list[LeafLayout],
    treedef: Any,
    new: Mesh,
    lost: frozenset[int],
) -> tuple[Any, int]:
    """The way for arrays of several processes: every process sees the whole leaf."""
    if lost:
        raise LostStateError(
            f"devices {sorted(lost)} are lost, and over several processes replicas "
            "cannot be reached. Go on from a checkpoint."
        )
    wholes = [to_host(x, leaf) for x, leaf in zip(leaves, layouts, strict=True)]
    moved = [from_host(x, leaf, new) for x, leaf in zip(wholes, layouts, strict=True)]
    return treedef.unflatten(moved), sum(x.nbytes for x in wholes)


def to_host(array: Array, leaf: LeafLayout) -> np.ndarray:
    """Copies the logical array to the memory of every process."""
    return gathered(array)[tuple(slice(0, size) for size in leaf.shape)]


def from_host(whole: np.ndarray, leaf: LeafLayout, mesh: Mesh) -> Array:
    """Places a logical array that every process has on a mesh."""
    shape = leaf.physical_shape(mesh.shape[SHARD_AXIS])
    pad = [(0, a - b) for a, b in zip(shape, leaf.shape, strict=True)]
    whole = np.pad(whole, pad) if any(after for _, after in pad) else whole
    sharding = leaf.sharding(mesh)
    # Copied, since on the CPU an array may be a view of the memory that it is given.
    pieces = [
        jax.device_put(np.array(whole[index]), device)
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def raw_leaf(leaf: LeafLayout) -> LeafLayout:
    """The leaf that holds the words of random keys; any other is its own."""
    if not is_key_dtype(leaf.dtype):
        return leaf
    raw = jax.eval_shape(jax.random.key_data, leaf.abstract)
    return dataclasses.replace(leaf, shape=raw.shape, dtype=raw.dtype)
