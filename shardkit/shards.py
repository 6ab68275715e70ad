"""Pieces of an array along one mesh axis, as seen from inside `shard_map`.

Owns the cutting rule: a dim is cut into equal pieces, the last ones padded where the
count does not divide it; what the padding of a piece holds is undefined. Invariant:
joining the pieces and dropping the padding gives back the array. It decides neither
which dim is cut nor on what mesh.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["Shards", "pad_dim"]


@dataclasses.dataclass(frozen=True)
class Shards:
    """How the leaves of a state are cut: into `count` pieces along one mesh axis.

    Attributes:
        axis: The mesh axis; None where nothing is cut, as outside `shard_map`.
        count: The size of that axis.
        exact: False lets float sums be taken as they come.
        grouped: Whether a group of devices holds each piece, of which the compiler cuts
            some dims. These must not be merged with others, and all groups must do the
            same: what the compiler lets devices exchange may need all of them.
    """

    axis: str | None = None
    count: int = 1
    exact: bool = True
    grouped: bool = False

    def piece(self, size: int) -> int:
        """Returns the physical size of one piece of a dim of `size`."""
        return -(-size // self.count)

    def split(self, x: Array, dim: int) -> Array:
        """Cuts a dim into equal zero-padded pieces, listed in a new first dim."""
        piece = self.piece(x.shape[dim])
        x = pad_dim(x, dim, piece * self.count)
        x = x.reshape(*x.shape[:dim], self.count, piece, *x.shape[dim + 1 :])
        return jnp.moveaxis(x, dim, 0)

    def join(self, pieces: Array, dim: int, size: int) -> Array:
        """Undoes `split`, dropping the padding of a dim of `size`."""
        x = jnp.moveaxis(pieces, 0, dim)
        length = x.shape[dim] * x.shape[dim + 1]
        x = x.reshape(*x.shape[:dim], length, *x.shape[dim + 2 :])
        return lax.slice_in_dim(x, 0, size, axis=dim)

    def all_gather(self, x: Array) -> Array:
        """Lists what every shard holds in a new first dim."""
        return x[None] if self.axis is None else lax.all_gather(x, self.axis)

    def gather(self, x: Array, dim: int, size: int) -> Array:
        """Joins the pieces of `dim` that the shards hold."""
        return self.join(self.all_gather(x), dim, size)

    def cut(self, x: Array, dim: int) -> Array:
        """Takes this device's piece of a whole array."""
        index = 0 if self.axis is None else lax.axis_index(self.axis)
        return lax.dynamic_index_in_dim(self.split(x, dim), index, keepdims=False)

    def mask(self, x: Array, dim: int, size: int, fill: Any) -> Array:
        """Overwrites the padding of a piece with `fill`."""
        if self.axis is None or self.count * x.shape[dim] == size:
            return x
        index = lax.broadcasted_iota(jnp.int32, x.shape, dim)
        index = index + lax.axis_index(self.axis) * x.shape[dim]
        return jnp.where(index < size, x, jnp.asarray(fill, x.dtype))

    def pmax(self, x: Array) -> Array:
        """Maximum over the pieces."""
        return x if self.axis is None else lax.pmax(x, self.axis)

    def psum(self, x: Array) -> Array:
        """Sum over the pieces."""
        return x if self.axis is None else lax.psum(x, self.axis)


def pad_dim(x: Array, dim: int, size: int) -> Array:
    """Appends zeros to `dim` up to `size`."""
    if x.shape[dim] == size:
        return x
    pad = [(0, 0)] * x.ndim
    pad[dim] = (0, size - x.shape[dim])
    return jnp.pad(x, pad)
