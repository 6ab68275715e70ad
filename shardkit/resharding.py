"""Moves trees of live arrays to other shardings.

Owns `reshard` and the choice of its ways: by a plan that is carried out piece by piece,
by one program with collectives, or through the memory of all hosts. Invariant: the
array is the same before and after, to the bit. What comes from where is `transfer`'s
decision, and the copies are `carry`'s.
"""

import collections
import enum
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, Sharding

from shardkit import carry
from shardkit.bits import is_packed
from shardkit.errors import ConfigError, InexactError, PartitionError
from shardkit.keys import is_key_dtype, raw
from shardkit.layout import Layout
from shardkit.mesh import device_ids
from shardkit.places import Places
from shardkit.transfer import plan_transfer
from shardkit.tree import named_leaves

__all__ = ["gathered", "like", "reshard"]


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
            process; or numbers in host memory, which are copied.
        shardings: A tree like it, or a prefix of it, of `NamedSharding` or shardings
            that cut nothing. They divide the shapes.
        donate: Whether the arrays may be used up, and with them whatever shares their
            memory; each is freed when it has been sent. What stays where it is becomes
            a part of the result, so do not touch the arrays afterwards, not even to
            delete them.
        scratch_bytes: How many bytes more than before or after (whichever is more) a
            device may hold; at least what the largest piece needs. None for what
            keeps the devices busy. Another kind of memory or other processes are
            reached without such a limit.

    Returns:
        The tree at its new place.

    Raises:
        ConfigError: If `scratch_bytes` is too small, naming the least. Arrays that may
            be used up are freed wave by wave, so that this can be more than for
            arrays that stay, whose bytes count as held afterwards.
        PartitionError: If a sharding is of another kind or does not fit its leaf,
            naming the leaves.
        InexactError: If numbers in host memory have 64 bits and need them, which are
            not enabled in JAX.

    Example:
        >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
        >>> mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
        >>> sharding = NamedSharding(mesh, PartitionSpec("x"))
        >>> reshard({"w": jax.numpy.arange(4)}, sharding)["w"].sharding == sharding
        True
    """
    if scratch_bytes is not None and type(scratch_bytes) is not int:
        raise ConfigError(
            f"scratch_bytes: expected a number of bytes, found {scratch_bytes!r}"
        )
    leaves, treedef = jax.tree.flatten(tree)
    wanted, their_treedef = jax.tree.flatten(shardings)
    if their_treedef != treedef:
        try:
            wanted = jax.tree.leaves(jax.tree.broadcast(shardings, tree))
        except ValueError as error:
            raise PartitionError(
                f"reshard: shardings must be a tree like that of the arrays, or a "
                f"prefix of it: {error}"
            ) from None
    _check_shardings(tree, leaves, wanted)
    # What is in host memory is copied first, lest it be shared on the CPU.
    arrays: list[Any] = [
        raw(x) if isinstance(x, Array) else np.array(x) for x in leaves
    ]
    _check_numbers(tree, leaves, arrays)
    # What is there twice is not used up before it has been moved twice.
    uses = collections.Counter(map(id, leaves))
    way, packed = functools.cache(_way), functools.cache(is_packed)
    ways: dict[tuple[int, bool], list[int]] = {}
    for i, (x, sharding) in enumerate(zip(arrays, wanted, strict=True)):
        # Collectives lose count of what is smaller than a byte.
        is_free = scratch_bytes is None and not packed(x.dtype)
        found = way(getattr(x, "sharding", None), sharding, is_free)
        ways.setdefault((found, donate and uses[id(leaves[i])] == 1), []).append(i)
    out: dict[int, Array] = {}
    # A plan first, which may refuse, and what uses nothing up before what does.
    for (found, may_use), chosen in sorted(ways.items()):
        some, there = [arrays[i] for i in chosen], [wanted[i] for i in chosen]
        if found == _Way.PLAN:
            moved = _by_plan(some, there, may_use, scratch_bytes)
        elif found == _Way.COLLECTIVES:
            moved = _by_collectives(some, there, may_use)
        elif found == _Way.PUT:
            moved = jax.device_put(some, there, may_alias=False)
        else:
            moved = [_through_hosts(x, s) for x, s in zip(some, there, strict=True)]
        out |= zip(chosen, moved, strict=True)
    if donate:
        # A plan that may use arrays up has done so, or made them part of the result.
        kept = itertools.chain(*(ways[key] for key in ways if key != (_Way.PLAN, True)))
        _delete(arrays[i] for i in kept)
    return treedef.unflatten(like(out[i], leaf) for i, leaf in enumerate(leaves))


def _check_shardings(tree: Any, leaves: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Refuses what no array can be moved to, before any is."""
    trouble = functools.cache(_misfit)
    wrong = [trouble(s, np.shape(x)) for x, s in zip(leaves, wanted, strict=True)]
    if any(wrong):
        found = _named(tree, wrong)
        raise PartitionError(
            f"reshard: {len(found)} leaves cannot be placed so. {'; '.join(found[:5])}"
            f"{'; …' if len(found) > 5 else ''}. Give a Sharding that divides the "
            "shape."
        )


def _misfit(sharding: Any, shape: tuple[int, ...]) -> str:
    if not isinstance(sharding, Sharding):
        return f"of shape {shape}: expected a Sharding, found {sharding!r}"
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        return f"of shape {shape}: {error}"
    return ""


def _check_numbers(tree: Any, leaves: Sequence[Any], arrays: Sequence[Any]) -> None:
    """Refuses numbers in host memory that JAX would round or cut off."""
    pairs = zip(leaves, arrays, strict=True)
    wrong = [
        "" if isinstance(x, Array | float | complex) else _altered(array)
        for x, array in pairs
    ]
    if any(wrong):
        found = _named(tree, wrong)
        raise InexactError(
            f"reshard: {len(found)} leaves hold numbers that JAX would alter: "
            f"{'; '.join(found[:5])}{'; …' if len(found) > 5 else ''}. Enable "
            "jax_enable_x64, or convert them yourself."
        )


def _altered(x: np.ndarray) -> str:
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    if dtype == x.dtype:
        return ""
    with np.errstate(all="ignore"):
        back = x.astype(dtype).astype(x.dtype)
    same = back.tobytes() == x.tobytes()
    return "" if same else f"is {x.dtype}, would be {dtype}"


def _named(tree: Any, wrong: Sequence[str]) -> list[str]:
    """Puts the paths of leaves before what is wrong with them."""
    paths = [path or "the array" for path, _ in named_leaves(tree)]
    return [f"{path} {text}" for path, text in zip(paths, wrong, strict=True) if text]


def _delete(arrays: Iterable[Any]) -> None:
    for x in arrays:
        if isinstance(x, Array):
            x.delete()


class _Way(enum.IntEnum):
    """How a leaf is moved.

    Where devices are linked and stay, each sends to every other at once when one
    program asks for all. What other processes have can only be had by such a program,
    or through the memory of all hosts. To and from other memory than that of the
    devices, and between devices of different kinds, JAX itself copies.
    """

    PLAN = 1
    COLLECTIVES = 2
    PUT = 3
    HOSTS = 4


def _way(old: Sharding | None, new: Sharding, is_free: bool) -> _Way:
    """Chooses a way; what is not on devices yet has no old sharding.

    Args:
        old: Where it is.
        new: Where it goes.
        is_free: Whether there may be a choice between a plan and collectives.
    """
    is_here = new.is_fully_addressable and (old is None or old.is_fully_addressable)
    if is_here and (old is None or len(_memories(old) | _memories(new)) > 1):
        return _Way.PUT
    if isinstance(old, NamedSharding) and isinstance(new, NamedSharding):
        meshes: list[Any] = [old.mesh, new.mesh]
        stays = device_ids(meshes[0]) == device_ids(meshes[1])
        is_linked = is_free and not carry.by_host(new.device_set)
        if stays and (is_linked or not is_here):
            return _Way.COLLECTIVES
    return _Way.PLAN if is_here else _Way.HOSTS


def _memories(sharding: Sharding) -> set[tuple[str, str | None]]:
    """Of what kind devices and memory are; where it is the devices' own, only they."""
    found = set()
    for device in sharding.device_set:
        kind = sharding.memory_kind
        is_own = kind in (None, device.default_memory().kind)
        found.add((device.platform, None if is_own else kind))
    # From one kind of other memory to the same a plan would not do either.
    return found | {("", None) for _, kind in found if kind is not None}


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


def _by_collectives(
    arrays: Sequence[Array], wanted: Sequence[Any], donate: bool
) -> list[Array]:
    """Moves arrays on their devices."""
    # Memory can be used again for pieces of the same shape only.
    used = tuple(
        i
        for i, (x, new) in enumerate(zip(arrays, wanted, strict=True))
        if donate and x.sharding.shard_shape(x.shape) == new.shard_shape(x.shape)
    )
    return _collective(tuple(wanted), used)(*arrays)


@functools.lru_cache(maxsize=16)
def _collective(shardings: tuple[Any, ...], donate_argnums: tuple[int, ...]) -> Any:
    """Makes the program that moves arrays on their devices.

    Kept, since JAX looks at every sharding anew when it is given a new function.
    """
    return jax.jit(
        lambda *arrays: list(arrays),
        out_shardings=list(shardings),
        donate_argnums=donate_argnums,
    )


def _through_hosts(array: Any, sharding: Any) -> Array:
    whole = gathered(array) if isinstance(array, Array) else array
    return jax.make_array_from_callback(whole.shape, sharding, lambda i: whole[i])


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


def like(data: Array, x: Any) -> Array:
    """Makes keys of their data, if `x` is keys."""
    if not (isinstance(x, Array) and is_key_dtype(x.dtype)):
        return data
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
