"""A digest of arrays that does not depend on who holds what.

Owns the one definition of "the same bits": per leaf, four sums modulo 2³² of a mix
of (logical index, bits). For a given index the mix is a bijection of the bits, so a
change of any single element changes all four sums; sums do not depend on order, so
every device adds what it holds. Padding is not part of it. An element wider than 32
bits is several 32-bit words with an index each, as if they were a last dim: a change
of one of them changes all four sums, a change of more could cancel in theory alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int32, UInt32

from shardkit.blocks import Blocks
from shardkit.keys import is_key_dtype
from shardkit.layout import LeafLayout

__all__ = ["combine_digests", "leaf_digest", "shard_digests"]

# Odd multipliers, from the fractional parts of square roots of small primes.
_LANE_KEYS = (0x6A09E667, 0xBB67AE85, 0x3C6EF373, 0xA54FF53B)
_INDEX_KEY, _FIRST_KEY, _SECOND_KEY = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35


def _bits(x: Array) -> Array:
    """Views an array as uint32 words, with a trailing dim of words per element."""
    if is_key_dtype(x.dtype):
        x = jax.random.key_data(x)
        return x.reshape(*x.shape[:-1], -1).astype(jnp.uint32)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
        return _bits(x).reshape(*x.shape[:-1], -1)
    width = jnp.dtype(x.dtype).itemsize * 8
    if jnp.issubdtype(x.dtype, jnp.integer) and width < 32:
        return x.astype(jnp.int32).astype(jnp.uint32)[..., None]
    unsigned = {8: jnp.uint8, 16: jnp.uint16}.get(width, jnp.uint32)
    words = lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    return words if words.ndim > x.ndim else words[..., None]


def _mix(x: Array) -> Array:
    """A bijection of uint32 that spreads every bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(_FIRST_KEY)
    x = (x ^ (x >> 13)) * jnp.uint32(_SECOND_KEY)
    return x ^ (x >> 16)


def leaf_digest(x: Array, leaf: LeafLayout) -> UInt32[Array, "4"]:
    """Computes the digest of one leaf; to be traced.

    Args:
        x: The global array, padded or not.
        leaf: Its layout, which tells padding from data.
    """
    return jnp.stack(_sums(x, leaf, [0] * x.ndim, num_kept=0))


def shard_digests(
    shard: Array, start: Int32[Array, " dims"], leaf: LeafLayout, blocks: Blocks
) -> UInt32[Array, "4 *leading chunks"]:
    """Computes what one shard adds to the digests of its leaf's blocks; to be traced.

    No other device is asked, so that it runs beside anything else. What all shards
    add, each box counted once, are the digests of the blocks, and these add up to
    `leaf_digest`.

    Args:
        shard: Part of the physical array.
        start: Of the shard in the global array; dynamic, so that a program serves
            all shards of a shape.
        leaf: The layout of the leaf, which tells padding from data.
        blocks: How the leaf is cut into blocks.

    Returns:
        Sums by the shard's own indices of the dims before `blocks.dim`, and by chunk,
        from the one in which the shard starts.
    """
    if blocks.dim < 0:
        return jnp.stack(_sums(shard, leaf, start, num_kept=0))
    dim, size = blocks.dim, shard.shape[blocks.dim]
    rows = jnp.stack(_sums(shard, leaf, start, num_kept=dim + 1))
    if blocks.chunk >= leaf.shape[dim]:
        return jnp.sum(rows, axis=-1, keepdims=True, dtype=jnp.uint32)
    # Chunks start at multiples of their size, wherever the shard does.
    num_chunks = -(-size // blocks.chunk) + 1
    room = jnp.zeros((*rows.shape[:-1], num_chunks * blocks.chunk), jnp.uint32)
    offset = [jnp.int32(0)] * (rows.ndim - 1) + [start[dim] % blocks.chunk]
    room = lax.dynamic_update_slice(room, rows, offset)
    room = room.reshape(*rows.shape[:-1], num_chunks, blocks.chunk)
    return jnp.sum(room, axis=-1, dtype=jnp.uint32)


def _sums(
    x: Array, leaf: LeafLayout, start: Sequence[Any] | Array, *, num_kept: int
) -> list[UInt32[Array, " *kept"]]:
    """The four sums over all dims but the first `num_kept`.

    Args:
        x: A part of the physical array.
        leaf: Its layout.
        start: Where the part starts, for every dim.
        num_kept: How many dims are not summed over.
    """
    words = _bits(x)
    shape = (*leaf.shape, words.shape[-1])
    index = jnp.zeros(words.shape, jnp.uint32)
    inside = jnp.ones(words.shape, jnp.bool_)
    stride = 1
    for dim in reversed(range(words.ndim)):
        position = lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        if dim < x.ndim:
            position = position + jnp.asarray(start[dim], jnp.uint32)
        index = index + position * jnp.uint32(stride % 2**32)
        inside = inside & (position < shape[dim])
        stride *= shape[dim]
    index = index * jnp.uint32(_INDEX_KEY)
    mixed = [_mix(words ^ _mix(index + jnp.uint32(key))) for key in _LANE_KEYS]
    # In one reduction, which reads every word once: 13 times faster than four sums.
    return lax.reduce(
        [jnp.where(inside, lane, 0) for lane in mixed],
        [jnp.uint32(0)] * len(mixed),
        lambda some, others: [a + b for a, b in zip(some, others, strict=True)],
        tuple(range(num_kept, words.ndim)),
    )


def combine_digests(digests: Mapping[str, np.ndarray], layout: Any) -> str:
    """Folds the digests of all leaves, and what they are, into one hex string.

    Args:
        digests: Path → the four sums.
        layout: A tree of `LeafLayout` with the same paths.
    """
    whole = hashlib.sha256()
    for leaf in sorted(jax.tree.leaves(layout), key=lambda leaf: leaf.path):
        lanes = " ".join(f"{int(lane):08x}" for lane in digests[leaf.path])
        whole.update(f"{leaf.path} {leaf.shape} {leaf.dtype} {lanes}\n".encode())
    return whole.hexdigest()[:32]
