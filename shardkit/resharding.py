"""Moves live arrays to other devices or another layout.

Owns the way from arrays and where they are wanted to a plan that is carried out, for
any tree and for a training state with its padding. Invariant: the logical array is the
same before and after, to the bit. What comes from where is `transfer`'s decision, and
the copies are `carry`'s.
"""

import dataclasses
import enum
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, Sharding

from shardkit import carry
from shardkit.errors import LostStateError
from shardkit.layout import SHARD_AXIS, Layout, LeafLayout
from shardkit.mesh import device_ids
from shardkit.places import Places
from shardkit.transfer import TransferPlan, plan_transfer

__all__ = ["Moved", "compile_move", "from_host", "move_state", "reshard", "to_host"]


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


def reshard(
    tree: Any,
    shardings: Any,
    *,
    donate: bool = False,
    scratch_bytes: int | None = None,
) -> Any:
    """Copies a tree of arrays to other shardings, straight from device to device.

    Args:
        tree: Arrays of any dtype, random keys among them, on any devices of this
            process.
        shardings: A tree like it, or a prefix of it, of `NamedSharding` or shardings
            that cut nothing.
        donate: Whether the arrays may be used up, and with them whatever shares their
            memory; each is freed when it has been sent.
        scratch_bytes: How many bytes more than before or after (whichever is more) a
            device may hold; at least what the largest piece needs. None for what
            keeps the devices busy.

    Returns:
        The tree at its new place.

    Raises:
        ConfigError: If `scratch_bytes` is too small, naming the least.
        PartitionError: If a sharding is of another kind.

    Example:
        >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
        >>> mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
        >>> sharding = NamedSharding(mesh, PartitionSpec("x"))
        >>> reshard({"w": jax.numpy.arange(4)}, sharding)["w"].sharding == sharding
        True
    """
    leaves, treedef = jax.tree.flatten(tree)
    wanted = jax.tree.leaves(
        jax.tree.map(
            lambda sharding, part: jax.tree.map(lambda _: sharding, part),
            shardings,
            tree,
            is_leaf=lambda x: isinstance(x, Sharding),
        ),
        is_leaf=lambda x: isinstance(x, Sharding),
    )
    arrays = list(map(_raw, leaves))
    way = functools.cache(_way)
    ways: dict[_Way, list[int]] = {}
    for i, (x, sharding) in enumerate(zip(arrays, wanted, strict=True)):
        ways.setdefault(way(x.sharding, sharding, scratch_bytes), []).append(i)
    out: dict[int, Array] = {}
    for found, chosen in ways.items():
        some, there = [arrays[i] for i in chosen], [wanted[i] for i in chosen]
        if found is _Way.COLLECTIVES:
            moved = _by_collectives(tuple(there), donate)(some)
        elif found is _Way.HOSTS:
            moved = [_through_hosts(x, s) for x, s in zip(some, there, strict=True)]
        else:
            moved = _by_plan(some, there, donate, scratch_bytes)
        out |= zip(chosen, moved, strict=True)
    return treedef.unflatten(_like(out[i], leaf) for i, leaf in enumerate(leaves))


class _Way(enum.Enum):
    """How a leaf is moved.

    Where devices are linked and stay, each sends to every other at once when one
    program asks for all. What other processes have can only be had by such a program,
    or through the memory of all hosts.
    """

    PLAN = 1
    COLLECTIVES = 2
    HOSTS = 3


def _way(old: Sharding, new: Sharding, scratch_bytes: int | None) -> _Way:
    is_here = old.is_fully_addressable and new.is_fully_addressable
    if isinstance(old, NamedSharding) and isinstance(new, NamedSharding):
        meshes: list[Any] = [old.mesh, new.mesh]
        stays = device_ids(meshes[0]) == device_ids(meshes[1])
        is_free = scratch_bytes is None and not carry.by_host(new.device_set)
        if stays and (is_free or not is_here):
            return _Way.COLLECTIVES
    return _Way.PLAN if is_here else _Way.HOSTS


def _by_plan(
    arrays: Sequence[Array],
    wanted: Sequence[Any],
    donate: bool,
    scratch_bytes: int | None,
) -> list[Array]:
    """Moves what this process has, as a plan says."""
    # No leaf can be lost here, so that nobody will hear these names.
    names = [str(i) for i in range(len(arrays))]
    layouts = _Layouts()
    source = [layouts.of(x, x.sharding) for x in arrays]
    target = [layouts.of(x, s) for x, s in zip(arrays, wanted, strict=True)]
    moved = carry.carry(
        plan_transfer(
            [dict(zip(names, source, strict=True))],
            dict(zip(names, target, strict=True)),
        ),
        dict(zip(names, arrays, strict=True)),
        dict(zip(names, wanted, strict=True)),
        keep_source=not donate,
        scratch_bytes=scratch_bytes,
    )
    return [moved[name] for name in names]


@functools.lru_cache(maxsize=16)
def _by_collectives(shardings: tuple[Any, ...], donate: bool) -> Any:
    """Makes the program that moves arrays on their devices.

    Kept, since JAX looks at every sharding anew when it is given a new function.
    """
    return jax.jit(
        lambda arrays: arrays,
        out_shardings=list(shardings),
        donate_argnums=0 if donate else (),
    )


def _through_hosts(array: Array, sharding: Any) -> Array:
    whole = _gathered(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda i: whole[i])


class _Layouts:
    """Layouts that leaves share, by which they are known as alike."""

    def __init__(self) -> None:
        self._known: dict[Any, Layout] = {}
        self._places: dict[Any, Places] = {}

    def of(self, array: Array, sharding: Any) -> Layout:
        key = sharding, array.shape, array.dtype
        if key not in self._known:
            mesh = getattr(sharding, "mesh", sharding)
            found = Layout.of_sharding(
                sharding, array.shape, array.dtype, self._places.get(mesh)
            )
            self._known[key] = found
            self._places[mesh] = found.places
        return self._known[key]


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
        return Moved(*_state_through_hosts(leaves, layouts, treedef, new, lost))
    raw = [_raw_layout(leaf) for leaf in layouts]
    plan = _plan(raw, old, new, lost)
    plan_s = time.monotonic() - start_s
    out = carry.carry(
        plan,
        {leaf.path: _raw(x) for leaf, x in zip(raw, leaves, strict=True)},
        {leaf.path: leaf.sharding(new) for leaf in raw},
        keep_source=keep_source,
    )
    moved = [_like(out[leaf.path], x) for leaf, x in zip(raw, leaves, strict=True)]
    return Moved(treedef.unflatten(moved), plan.totals.bytes_moved, plan_s)


def compile_move(layout: Any, old: Mesh, new: Mesh, *, keep_source: bool) -> None:
    """Compiles the programs that `move_state` needs from one mesh to another.

    Args:
        layout: A tree of `LeafLayout`.
        old: Where the state will be.
        new: Where it will go.
        keep_source: As in `move_state`.
    """
    raw = [_raw_layout(leaf) for leaf in jax.tree.leaves(layout)]
    carry.compile_carry(
        _plan(raw, old, new, frozenset()),
        {leaf.path: leaf.dtype for leaf in raw},
        {leaf.path: leaf.sharding(new) for leaf in raw},
        old.devices.flat,
        keep_source=keep_source,
    )


def _plan(
    layouts: list[LeafLayout], old: Mesh, new: Mesh, lost: frozenset[int]
) -> TransferPlan:
    source, target = (_laid_out(layouts, Places.of_mesh(x)) for x in (old, new))
    return plan_transfer([source], target, lost=lost)


def _laid_out(leaves: Sequence[LeafLayout], places: Places) -> dict[str, Layout]:
    """Layouts by path; leaves that are alike share theirs."""
    known: dict[Any, Layout] = {}
    found = {}
    for leaf in leaves:
        key = leaf.shape, leaf.dtype, leaf.dim
        if key not in known:
            known[key] = Layout.of_leaf(leaf, places)
        found[leaf.path] = known[key]
    return found


def _state_through_hosts(
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
    return _gathered(array)[tuple(slice(0, size) for size in leaf.shape)]


def _gathered(array: Array) -> np.ndarray:
    """The whole array in the memory of every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


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


def _is_key(x: Any) -> bool:
    return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def _raw(x: Any) -> Array:
    if not isinstance(x, Array):
        x = jax.numpy.asarray(x)
    return jax.random.key_data(x) if _is_key(x) else x


def _raw_layout(leaf: LeafLayout) -> LeafLayout:
    if not _is_key(leaf.abstract):
        return leaf
    raw = jax.eval_shape(jax.random.key_data, leaf.abstract)
    return dataclasses.replace(leaf, shape=raw.shape, dtype=raw.dtype)


def _like(raw: Array, x: Any) -> Array:
    if not _is_key(x):
        return raw
    return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(x))
