"""Puts pieces together where host memory is the memory of all devices.

Owns copies between emulated devices of the CPU backend: a shard is a view of host
memory, so a piece that lies in one shard as it is needed is a view as well, and any
other is put together by numpy. Invariant: no program is compiled, and a shard is lent
only if all of it is in use as views.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from shardkit.kinds import Kind, Part

__all__ = ["copy_on_host"]

_ALIGNMENT = 64  # of memory that the backend takes as it is


def copy_on_host(
    kinds: Sequence[Kind],
    shards: Sequence[dict[int, Array]],
    devices: dict[int, Any],
    *,
    keep_source: bool,
) -> list[list[Array]]:
    """Makes the pieces of some leaves.

    Args:
        kinds: What each leaf is.
        shards: For each leaf: the id of a source's device → shard.
        devices: Id → device.
        keep_source: Whether shards stay usable.

    Returns:
        For each leaf the pieces, in the order of `Kind.parts`.
    """
    lent = {kind: _lent(kind) for kind in dict.fromkeys(kinds)}

    def make(leaf: tuple[Kind, dict[int, Array]], id: int) -> Array:
        kind, mine = leaf
        if kind.is_kept(id, keep_source):
            return mine[id]
        parts = kind.parts[id]
        if len(parts) == 1 and parts[0].source in lent[kind]:
            found = np.asarray(mine[parts[0].source])[_slices(parts[0].box)]
            if found.shape == kind.piece_shape:
                return jax.device_put(found, devices[id])
        return jax.device_put(_filled(kind, parts, mine), devices[id])

    # One thread: several fight over fresh pages, and were slower and less steady.
    return [
        [make(leaf, id) for id in leaf[0].parts]
        for leaf in zip(kinds, shards, strict=True)
    ]


def _lent(kind: Kind) -> set[int]:
    """The sources whose shards go on being used as views, every element of them."""
    taken: dict[int, set[Part]] = collections.defaultdict(set)
    for parts in kind.parts.values():
        if len(parts) == 1 and parts[0].shape == kind.piece_shape:
            taken[parts[0].source].add(parts[0])
    whole = math.prod(kind.shard_shape)
    # A piece alone would keep the memory of the whole shard.
    return {
        source
        for source, parts in taken.items()
        if sum({part.box: math.prod(part.shape) for part in parts}.values()) == whole
    }


def _filled(kind: Kind, parts: Sequence[Part], shards: dict[int, Array]) -> np.ndarray:
    whole = _empty(kind.piece_shape, kind.dtype)
    if sum(math.prod(part.shape) for part in parts) < whole.size:
        whole.view(_bits(kind.dtype))[...] = 0
    for part in parts:
        there = tuple(
            slice(at, at + size)
            for at, size in zip(part.offset, part.shape, strict=True)
        )
        piece = np.asarray(shards[part.source])[_slices(part.box)]
        # Bits alone, which numpy copies faster than numbers it does not know.
        whole.view(_bits(kind.dtype))[there] = piece.view(_bits(kind.dtype))
    return whole


def _slices(box: Any) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _bits(dtype: Any) -> Any:
    return np.dtype(f"u{dtype.itemsize}") if dtype.itemsize <= 8 else dtype


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory that the backend need not copy once more."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)
