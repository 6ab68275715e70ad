"""Carries a plan of transfers out on live arrays of one process.

Owns the copies: each piece is cut on the device that has it, copied straight to the
device that wants it, and put together there. Invariant: what a device holds afterwards
is, to the bit, what the plan says; what is padding is zero. It decides nothing.

On the CPU backend all devices share one memory, and a shard is a view of it, so pieces
are put together by numpy: no program need be compiled.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

from shardkit.errors import ConfigError
from shardkit.layout import Layout
from shardkit.senders import Cost
from shardkit.transfer import Transfer, TransferPlan

__all__ = ["carry"]

_NUM_THREADS = 4
Offsets = tuple[tuple[int, ...], ...]


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
        scratch_bytes: How many bytes may be on their way at a time, beside what is
            held before and after; None for any number.

    Returns:
        Path → array.

    Raises:
        ConfigError: If `scratch_bytes` is less than what one piece needs.
    """
    devices = {
        device.id: device
        for sharding in {*shardings.values()}
        for device in sharding.device_set
    }
    assemble = _OnHost() if by_host(devices.values()) else _OnDevices()
    least = max((x.piece_bytes for x in plan.target.values()), default=0)
    if scratch_bytes is not None and scratch_bytes < least:
        raise ConfigError(
            f"scratch_bytes: the largest piece needs {least} bytes on its way, found "
            f"{scratch_bytes}. Give it at least {least}."
        )
    flight, out = _Flight(scratch_bytes), {}
    with assemble:
        for path, sharding in shardings.items():
            layout, source = plan.target[path], plan.sources[0][path]
            shards = {s.device.id: s.data for s in arrays[path].addressable_shards}
            ids = layout.places.ids.ravel().tolist()
            wanted = [plan.pieces(path, id) for id in ids]
            flight.make_room(max(map(_scratch_bytes, wanted), default=0))
            parts = [
                _Part(t, shards[t.source], source.slices(t.source, t.box), i)
                for i, transfers in enumerate(wanted)
                for t in transfers
            ]
            leaf = _Leaf(arrays[path].dtype, layout, [devices[id] for id in ids])
            pieces = assemble(parts, leaf, keep_source)
            shape = map(math.prod, zip(layout.piece_shape, layout.counts, strict=True))
            out[path] = jax.make_array_from_single_device_arrays(
                tuple(shape), sharding, pieces
            )
            flight.add(out[path])
            if not keep_source:
                kept = {id(piece) for piece in pieces}
                for shard in shards.values():
                    if id(shard) not in kept:
                        shard.delete()
    return out


def by_host(devices: Iterable[Any]) -> bool:
    """Whether host memory is the memory of all of these devices."""
    return all(device.platform == "cpu" for device in devices)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """What is to be made of one leaf: an array of `layout.piece_shape` per device."""

    dtype: Any
    layout: Layout
    devices: list[Any]

    def offsets(self, transfer: Transfer) -> tuple[int, ...]:
        """Where a box begins inside the target's array."""
        slices = self.layout.slices(transfer.target, transfer.box)
        return tuple(part.start for part in slices)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A box, the shard that has it, where it is in there, and for which target."""

    transfer: Transfer
    shard: Array
    slices: tuple[slice, ...]
    target: int


def _scratch_bytes(transfers: Sequence[Transfer]) -> int:
    """Bytes that are on a target before they are put together."""
    return sum(t.num_bytes for t in transfers if not t.is_whole)


class _OnDevices:
    """Cuts, copies and joins on the devices."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(
        self, parts: Sequence[_Part], leaf: _Leaf, keep_source: bool
    ) -> list[Array]:
        """Makes the array of every device."""
        cut = [
            part.shard if part.transfer.is_whole else _cut(part.shard, part.slices)
            for part in parts
        ]
        moving = [i for i, p in enumerate(parts) if p.transfer.cost > Cost.SAME_DEVICE]
        sent = jax.device_put(
            [cut[i] for i in moving],
            [leaf.devices[parts[i].target] for i in moving],
        )
        for i, array in zip(moving, sent, strict=True):
            cut[i] = array
        found: list[list[int]] = [[] for _ in leaf.devices]
        for i, part in enumerate(parts):
            found[part.target].append(i)
        out = []
        for device, mine in zip(leaf.devices, found, strict=True):
            if len(mine) == 1 and parts[mine[0]].transfer.is_whole:
                stays = parts[mine[0]].transfer.cost <= Cost.SAME_DEVICE
                array = cut[mine[0]]
                out.append(_copy(array) if stays and keep_source else array)
            elif mine:
                offsets = tuple(leaf.offsets(parts[i].transfer) for i in mine)
                arrays = [cut[i] for i in mine]
                out.append(_join(arrays, offsets, leaf.layout.piece_shape))
            else:
                out.append(
                    jnp.zeros(leaf.layout.piece_shape, leaf.dtype, device=device)
                )
        return out


@functools.partial(jax.jit, static_argnums=1)
def _cut_jit(x: Array, box: tuple[tuple[int, int], ...]) -> Array:
    starts, stops = zip(*box, strict=True)
    return lax.slice(x, starts, stops)


def _cut(x: Array, slices: tuple[slice, ...]) -> Array:
    return _cut_jit(x, tuple((part.start, part.stop) for part in slices))


@jax.jit
def _copy(x: Array) -> Array:
    return x.copy()


@functools.partial(jax.jit, static_argnums=(1, 2))
def _join(parts: Sequence[Array], offsets: Offsets, shape: tuple[int, ...]) -> Array:
    """Puts parts into an array of zeros."""
    dim = _joined_dim(parts, offsets, shape)
    if dim is not None:
        whole = lax.concatenate(parts, dim)
        pad = [(0, a - b, 0) for a, b in zip(shape, whole.shape, strict=True)]
        return lax.pad(whole, jnp.zeros((), whole.dtype), pad)
    out = jnp.zeros(shape, parts[0].dtype)
    for part, start in zip(parts, offsets, strict=True):
        out = lax.dynamic_update_slice(out, part, start)
    return out


def _joined_dim(
    parts: Sequence[Array], offsets: Offsets, shape: tuple[int, ...]
) -> int | None:
    """The dim along which the parts, in their order, lie one behind the other."""
    for dim in range(len(shape)):
        at = 0
        for part, start in zip(parts, offsets, strict=True):
            if start != (*[0] * dim, at, *[0] * (len(shape) - dim - 1)):
                break
            if part.shape[:dim] + part.shape[dim + 1 :] != (
                parts[0].shape[:dim] + parts[0].shape[dim + 1 :]
            ):
                break
            at += part.shape[dim]
        else:
            return dim
    return None


class _OnHost:
    """Puts pieces together by numpy, where shards are views of host memory."""

    def __enter__(self) -> None:
        self._pool = ThreadPoolExecutor(_NUM_THREADS)

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def __call__(
        self, parts: Sequence[_Part], leaf: _Leaf, keep_source: bool
    ) -> list[Array]:
        """Makes the array of every device."""
        found: list[list[_Part]] = [[] for _ in leaf.devices]
        for part in parts:
            found[part.target].append(part)

        def make(at: int) -> Array:
            return self._make(found[at], leaf, leaf.devices[at], keep_source)

        return list(self._pool.map(make, range(len(leaf.devices))))

    def _make(
        self, parts: Sequence[_Part], leaf: _Leaf, device: Any, keep_source: bool
    ) -> Array:
        if len(parts) == 1 and parts[0].transfer.is_whole:
            [part] = parts
            if part.transfer.cost <= Cost.SAME_DEVICE and not keep_source:
                return part.shard
            return jax.device_put(part.shard, device, may_alias=False)
        whole = np.zeros(leaf.layout.piece_shape, leaf.dtype)
        for part in parts:
            begin = leaf.offsets(part.transfer)
            at = tuple(
                slice(b, b + s.stop - s.start)
                for b, s in zip(begin, part.slices, strict=True)
            )
            whole[at] = np.asarray(part.shard)[part.slices]
        # An array that borrows numpy's memory could not be donated later.
        return jax.device_put(whole, device, may_alias=False)


class _Flight:
    """What is on its way, so that it can be kept below a limit."""

    def __init__(self, limit: int | None) -> None:
        self._limit, self._bytes, self._next = limit, 0, 0
        self._arrays: collections.deque[tuple[Array, int]] = collections.deque()

    def make_room(self, num_bytes: int) -> None:
        """Waits until so much more may be on its way."""
        self._next = num_bytes
        while (
            self._limit is not None
            and self._arrays
            and self._bytes + num_bytes > self._limit
        ):
            array, done = self._arrays.popleft()
            jax.block_until_ready(array)
            self._bytes -= done

    def add(self, array: Array) -> None:
        """Notes what was let in last."""
        self._bytes += self._next
        self._arrays.append((array, self._next))
