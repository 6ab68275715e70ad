"""Moves trees of live arrays to other shardings.

Owns `reshard` and the choice of its ways: by a plan that is carried out piece by piece,
by one program with collectives, or through the memory of all hosts. Invariant: the
array is the same before and after, to the bit. What comes from where is `transfer`'s
decision, and the copies are `carry`'s.
"""

import enum
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, Sharding

from shardkit import carry
from shardkit.layout import Layout
from shardkit.mesh import device_ids
from shardkit.places import Places
from shardkit.transfer import plan_transfer

__all__ = ["gathered", "is_key", "like", "raw", "reshard"]


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
    arrays = list(map(raw, leaves))
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
    return treedef.unflatten(like(out[i], leaf) for i, leaf in enumerate(leaves))


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
    whole = gathered(array)
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


def gathered(array: Array) -> np.ndarray:
    """The whole array in the memory of every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def is_key(x: Any) -> bool:
    """Whether it is an array of random keys, abstract or not."""
    return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def raw(x: Any) -> Array:
    """What a leaf consists of: the data of keys, and an array of anything else."""
    if not isinstance(x, Array):
        x = jax.numpy.asarray(x)
    return jax.random.key_data(x) if is_key(x) else x


def like(raw: Array, x: Any) -> Array:
    """Makes keys of their data, if `x` is keys."""
    if not is_key(x):
        return raw
    return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(x))
