"""Carries a plan of transfers out on live arrays of one process.

Owns the copies: each piece is cut on the device that has it, copied straight to the
device that wants it, and put together there. Invariant: what a device holds afterwards
is, to the bit, what the plan says; what is padding is zero. It decides nothing.

On the CPU backend all devices share one memory, and a shard is a view of it, so pieces
are put together by numpy: no program need be compiled.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

from shardkit.errors import ConfigError
from shardkit.layout import Box
from shardkit.senders import Cost
from shardkit.transfer import TransferPlan

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
    least = max((x.piece_bytes for x in plan.target.values()), default=0)
    if scratch_bytes is not None and scratch_bytes < least:
        raise ConfigError(
            f"scratch_bytes: the largest piece needs {least} bytes on its way, found "
            f"{scratch_bytes}. Give it at least {least}."
        )
    make = _on_host if by_host(devices.values()) else _on_devices
    out: dict[str, Array] = {}
    for wave in _waves(plan, shardings, scratch_bytes):
        leaves = [
            _Leaf(
                kind,
                arrays[path].dtype,
                {s.device.id: s.data for s in arrays[path].addressable_shards},
                [devices[id] for id in kind.targets],
            )
            for path, kind in wave
        ]
        made = make(leaves, keep_source)
        for (path, kind), leaf, pieces in zip(wave, leaves, made, strict=True):
            out[path] = jax.make_array_from_single_device_arrays(
                kind.shape, shardings[path], pieces
            )
            if not keep_source:
                kept = {id(piece) for piece in pieces}
                for shard in leaf.shards.values():
                    if id(shard) not in kept:
                        shard.delete()
        if scratch_bytes is not None:
            jax.block_until_ready([out[path] for path, _ in wave])
    return out


def by_host(devices: Iterable[Any]) -> bool:
    """Whether host memory is the memory of all of these devices."""
    return all(device.platform == "cpu" for device in devices)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A box: which shard has it, where in there, and where it goes."""

    source: int
    target: int
    is_whole: bool
    stays: bool
    box: Box
    offset: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What leaves of one shape have in common that go the same way.

    Attributes:
        shape: The physical shape at the target.
        piece_shape: That of every piece.
        targets: The ids of the target's devices.
        parts: For each of them what it is made of.
        scratch_bytes: What is on the fullest of them before it is put together.
    """

    shape: tuple[int, ...]
    piece_shape: tuple[int, ...]
    targets: list[int]
    parts: list[list[_Part]]
    scratch_bytes: int


@dataclasses.dataclass(frozen=True)
class _Leaf:
    kind: _Kind
    dtype: Any
    shards: dict[int, Array]
    devices: list[Any]


def _waves(
    plan: TransferPlan, paths: Iterable[str], limit: int | None
) -> Iterator[list[tuple[str, _Kind]]]:
    """Groups leaves that may be on their way together."""
    kinds: dict[Any, _Kind] = {}
    wave: list[tuple[str, _Kind]] = []
    room = limit
    for path in paths:
        source, target = plan.sources[0][path], plan.target[path]
        key = tuple(
            (x.shape, x.cuts, x.itemsize, id(x.places)) for x in (source, target)
        )
        if key not in kinds:
            kinds[key] = _kind(plan, path)
        kind = kinds[key]
        if room is not None and limit is not None:
            if wave and kind.scratch_bytes > room:
                yield wave
                wave, room = [], limit
            room -= kind.scratch_bytes
        wave.append((path, kind))
    if wave:
        yield wave


def _kind(plan: TransferPlan, path: str) -> _Kind:
    source, target = plan.sources[0][path], plan.target[path]
    targets, parts, most = target.places.ids.ravel().tolist(), [], 0
    for at, id in enumerate(targets):
        found = plan.pieces(path, id)
        most = max(most, sum(t.num_bytes for t in found if not t.is_whole))
        parts.append(
            [
                _Part(
                    t.source,
                    at,
                    t.is_whole,
                    t.cost <= Cost.SAME_DEVICE,
                    tuple((s.start, s.stop) for s in source.slices(t.source, t.box)),
                    tuple(s.start for s in target.slices(id, t.box)),
                )
                for t in found
            ]
        )
    pieces = target.piece_shape
    shape = tuple(map(math.prod, zip(pieces, target.counts, strict=True)))
    return _Kind(shape, pieces, targets, parts, most)


def _on_devices(leaves: Sequence[_Leaf], keep_source: bool) -> list[list[Array]]:
    """Cuts, copies and joins on the devices; all copies are asked for at once."""
    cut: list[Array] = []
    moving: list[int] = []
    devices: list[Any] = []
    for leaf in leaves:
        for part in (part for parts in leaf.kind.parts for part in parts):
            shard = leaf.shards[part.source]
            if not part.stays:
                moving.append(len(cut))
                devices.append(leaf.devices[part.target])
            cut.append(shard if part.is_whole else _cut(shard, part.box))
    sent = jax.device_put([cut[i] for i in moving], devices)
    for i, array in zip(moving, sent, strict=True):
        cut[i] = array
    arrays = iter(cut)
    return [
        [
            _put_together(leaf, parts, device, arrays, keep_source)
            for device, parts in zip(leaf.devices, leaf.kind.parts, strict=True)
        ]
        for leaf in leaves
    ]


def _put_together(
    leaf: _Leaf,
    parts: Sequence[_Part],
    device: Any,
    arrays: Iterator[Array],
    keep_source: bool,
) -> Array:
    """Makes one piece from the next arrays, one for each part."""
    if not parts:
        return jnp.zeros(leaf.kind.piece_shape, leaf.dtype, device=device)
    mine = [next(arrays) for _ in parts]
    if parts[0].is_whole:
        return _copy(mine[0]) if parts[0].stays and keep_source else mine[0]
    return _join(mine, tuple(part.offset for part in parts), leaf.kind.piece_shape)


@functools.partial(jax.jit, static_argnums=1)
def _cut(x: Array, box: Box) -> Array:
    starts, stops = zip(*box, strict=True)
    return lax.slice(x, starts, stops)


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
        rest = [part.shape[:dim] + part.shape[dim + 1 :] for part in parts]
        ends = itertools.accumulate(part.shape[dim] for part in parts)
        starts = [
            (*[0] * dim, at, *[0] * (len(shape) - dim - 1))
            for at in [0, *ends][: len(parts)]
        ]
        if len(set(rest)) == 1 and starts == list(offsets):
            return dim
    return None


def _on_host(leaves: Sequence[_Leaf], keep_source: bool) -> list[list[Array]]:
    """Puts pieces together by numpy, where shards are views of host memory."""

    def make(leaf: _Leaf) -> list[Array]:
        return [
            _fill(leaf, parts, device, keep_source)
            for device, parts in zip(leaf.devices, leaf.kind.parts, strict=True)
        ]

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(make, leaves))


def _fill(leaf: _Leaf, parts: Sequence[_Part], device: Any, keep_source: bool) -> Array:
    if parts and parts[0].is_whole:
        shard = leaf.shards[parts[0].source]
        if parts[0].stays and not keep_source:
            return shard
        return jax.device_put(shard, device, may_alias=False)
    whole = np.zeros(leaf.kind.piece_shape, leaf.dtype)
    for part in parts:
        there = tuple(
            slice(at, at + stop - start)
            for at, (start, stop) in zip(part.offset, part.box, strict=True)
        )
        here = tuple(slice(start, stop) for start, stop in part.box)
        whole[there] = np.asarray(leaf.shards[part.source])[here]
    # An array that borrows numpy's memory could not be donated later.
    return jax.device_put(whole, device, may_alias=False)
