"""Collectives over many leaves at once, in buckets.

Owns the packing: small leaves travel together in one buffer, since on every backend
a collective costs far more to begin than a few kilobytes cost to send. Invariant:
packing moves bits and computes nothing. It must run inside `shard_map`.

References:
    Li et al., PyTorch Distributed: Experiences on Accelerating Data Parallel Training
    (VLDB 2020), for gradient buckets.
"""

import contextlib
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from shardkit.labels import label
from shardkit.shards import Shards

__all__ = ["gather_pieces", "psum", "sum_to_pieces"]

# Packing costs a copy, so that a bucket is also the most memory it adds.
_BUCKET_BYTES = 32 << 20


def gather_pieces(
    pieces: Sequence[Array],
    dims: Sequence[int],
    sizes: Sequence[int],
    shards: Shards,
    names: Sequence[str] = (),
) -> list[Array]:
    """Joins the pieces of many leaves; one all-gather per bucket.

    Args:
        pieces: This device's pieces.
        dims: The cut dim of each.
        sizes: The logical size of that dim.
        shards: How they are cut.
        names: What each leaf is called, to label its collective as a gather.
    """
    shapes = [piece.shape for piece in pieces]
    rows = _in_buckets(list(pieces), shapes, shards.all_gather, "gather", names)
    return [
        shards.join(row, dim, size)
        for row, dim, size in zip(rows, dims, sizes, strict=True)
    ]


def sum_to_pieces(
    wholes: Sequence[Array],
    dims: Sequence[int],
    shards: Shards,
    axes: Sequence[str],
    names: Sequence[str] = (),
) -> list[Array]:
    """Adds many leaves over all devices; each device keeps its own pieces.

    Args:
        wholes: What this device adds.
        dims: The dim along which each sum is wanted cut, -1 for whole.
        shards: How they are cut.
        axes: The mesh axes over which is added: that of `shards`, if it has one, and
            those over which pieces are replicated.
        names: What each leaf is called, to label its collective as a sum.
    """
    axes = tuple(axes)
    others = tuple(axis for axis in axes if axis != shards.axis)
    cut = [i for i, dim in enumerate(dims) if dim >= 0]
    whole = [i for i, dim in enumerate(dims) if dim < 0]

    def scatter(flat: Array) -> Array:
        if shards.axis is None:
            return psum(flat[0], others)
        return psum(lax.psum_scatter(flat, shards.axis), others)

    def named(places: list[int]) -> list[str]:
        return [names[i] for i in places] if names else []

    pieces = [shards.split(wholes[i], dims[i]) for i in cut]
    summed = dict(
        zip(
            cut,
            _in_buckets(
                pieces, [p.shape[1:] for p in pieces], scatter, "sum", named(cut)
            ),
            strict=True,
        )
    )
    rest = [wholes[i] for i in whole]
    everywhere = _in_buckets(
        rest,
        [x.shape for x in rest],
        lambda flat: psum(flat, axes),
        "sum",
        named(whole),
    )
    summed.update(zip(whole, everywhere, strict=True))
    return [summed[i] for i in range(len(dims))]


def psum(x: Array, axes: tuple[str, ...]) -> Array:
    """Sums over the devices along some axes; of none there is one device."""
    # One axis by its name, as two ways to say the same are two programs.
    return lax.psum(x, axes[0] if len(axes) == 1 else axes) if axes else x


def _in_buckets(
    arrays: list[Array],
    shapes: list[tuple[int, ...]],
    collective: Callable[[Array], Array],
    purpose: str,
    names: Sequence[str],
) -> list[Array]:
    """Applies a collective to arrays packed along their last `shapes`.

    The collective may add or remove leading dims, but keeps the last one. It is
    labelled with its purpose where the arrays have names.
    """
    out: list[Array] = []
    for bucket in _buckets(arrays):
        sizes = [math.prod(shapes[i]) for i in bucket]
        flat = [
            arrays[i].reshape(*arrays[i].shape[: arrays[i].ndim - len(shapes[i])], size)
            for i, size in zip(bucket, sizes, strict=True)
        ]
        packed = flat[0] if len(flat) == 1 else jnp.concatenate(flat, -1)
        labelled = contextlib.nullcontext()
        if names:
            # A gradient can travel in two halves.
            labelled = label(purpose, list(dict.fromkeys(names[i] for i in bucket)))
        with labelled:
            packed = collective(packed)
        ends = np.cumsum(sizes)[:-1].tolist()
        for i, part in zip(bucket, jnp.split(packed, ends, axis=-1), strict=True):
            out.append(part.reshape(*part.shape[:-1], *shapes[i]))
    return out


def _buckets(arrays: list[Array]) -> list[list[int]]:
    """Groups neighbours of one dtype up to the size of a bucket."""
    groups: list[list[int]] = []
    room, dtype = 0, None
    for i, array in enumerate(arrays):
        if array.dtype != dtype or array.nbytes > room:
            groups.append([])
            room, dtype = _BUCKET_BYTES, array.dtype
        groups[-1].append(i)
        room -= array.nbytes
    return groups
