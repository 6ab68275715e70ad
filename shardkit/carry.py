"""Carries a plan of transfers out on live arrays of one process.

Owns the order of things: waves of leaves on their way together, copied by programs on
the devices or, where host memory is the memory of all of them, by numpy. Invariant:
what a device holds afterwards is, to the bit, what the plan says; padding comes with a
shard that is taken whole, and is zero elsewhere. It decides nothing about who sends
what.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding, SingleDeviceSharding

from shardkit.device_copies import copy_on_devices
from shardkit.host_copies import copy_on_host
from shardkit.kinds import Kind, kinds_of, waves
from shardkit.transfer import TransferPlan

__all__ = ["by_host", "carry", "compile_carry"]


def carry(
    plan: TransferPlan,
    arrays: Mapping[str, Array],
    shardings: Mapping[str, NamedSharding],
    *,
    keep_source: bool,
    scratch_bytes: int | None = None,
) -> dict[str, Array]:
    """Makes arrays laid out as the plan's target from those of its first source.

    Args:
        plan: Whose first source is where `arrays` are.
        arrays: Path → array; physical, as `Layout` pads it.
        shardings: Path → where it goes.
        keep_source: Whether `arrays` stay usable. Otherwise each is deleted as soon as
            it has been sent, and what does not move is not copied.
        scratch_bytes: How many bytes more than before or after a device may hold; None
            for what keeps the devices busy.

    Returns:
        Path → array.

    Raises:
        ConfigError: If `scratch_bytes` is too small, naming the least.
    """
    devices = _devices(shardings)
    kinds = kinds_of(plan, {path: x.dtype for path, x in arrays.items()})
    copy = copy_on_host if by_host(devices.values()) else copy_on_devices
    out: dict[str, Array] = {}
    done: list[Array] = []
    for wave in waves(kinds, keep_source=keep_source, limit_bytes=scratch_bytes):
        # What the wave before has freed is only free when it has been copied.
        jax.block_until_ready(done)
        some = [kinds[path] for path in wave]
        shards = [
            _shards(arrays[path], order)
            for path, order in zip(wave, _orders(arrays, wave, kinds), strict=True)
        ]
        made = copy(some, shards, devices, keep_source=keep_source)
        for path, kind, mine, pieces in zip(wave, some, shards, made, strict=True):
            out[path] = jax.make_array_from_single_device_arrays(
                kind.shape, shardings[path], pieces
            )
            if not keep_source:
                for id, shard in mine.items():
                    if not kind.is_kept(id, keep_source):
                        shard.delete()
        done = [out[path] for path in wave]
    return {path: out[path] for path in arrays}


def compile_carry(
    plan: TransferPlan,
    dtypes: Mapping[str, Any],
    shardings: Mapping[str, NamedSharding],
    sources: Iterable[Any],
    *,
    keep_source: bool,
) -> None:
    """Compiles the programs with which `carry` would carry a plan out.

    Args:
        plan: The plan.
        dtypes: Path → dtype.
        shardings: Path → where it goes.
        sources: The devices of the plan's first source.
        keep_source: As in `carry`.
    """
    devices = _devices(shardings)
    if by_host(devices.values()):
        return
    where = {device.id: SingleDeviceSharding(device) for device in sources}
    kinds = kinds_of(plan, dict(dtypes))
    for wave in waves(kinds, keep_source=keep_source, limit_bytes=None):
        some = [kinds[path] for path in wave]
        shards: list[dict[int, Any]] = [
            {
                id: jax.ShapeDtypeStruct(
                    kind.shard_shape, kind.dtype, sharding=where[id]
                )
                for id in kind.sources
            }
            for kind in some
        ]
        copy_on_devices(
            some, shards, devices, keep_source=keep_source, only_compile=True
        )


def by_host(devices: Iterable[Any]) -> bool:
    """Whether host memory is the memory of all of these devices."""
    return all(device.platform == "cpu" for device in devices)


def _devices(shardings: Mapping[str, NamedSharding]) -> dict[int, Any]:
    found = set().union(*(s.device_set for s in {*shardings.values()}))
    return {device.id: device for device in found}


def _orders(
    arrays: Mapping[str, Array], paths: Iterable[str], kinds: Mapping[str, Kind]
) -> Iterator[list[int]]:
    """For each leaf the ids of its devices, in the order of its shards."""
    known: dict[Kind, list[int]] = {}
    for path in paths:
        kind = kinds[path]
        if kind not in known:
            shards = arrays[path].addressable_shards
            known[kind] = [shard.device.id for shard in shards]
        yield known[kind]


def _shards(array: Array, order: Iterable[int]) -> dict[int, Array]:
    """The id of a device → its shard."""
    order = list(order)
    if array.is_fully_replicated and len(order) > 1:
        # Whose data is asked for by number would be the same device's each time; but
        # of a single shard the data keeps the mesh, for which nothing was compiled.
        return {shard.device.id: shard.data for shard in array.addressable_shards}
    return {id: array.addressable_data(i) for i, id in enumerate(order)}
