"""Operations on one piece of an array that keep it cut.

Owns, for each operation that moves or reduces dims, what it is on a piece, and where
the cut goes. A rule returns None where there is no local form. Reductions here are
those that no order can change; float sums are not among them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from shardkit.jaxprs import results
from shardkit.shards import Shards

__all__ = ["RULES", "Shard", "dim_after_reduction"]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A value during translation: whole, or this device's piece along one dim.

    Attributes:
        array: The whole array, or the padded piece.
        dim: The dim that is cut; None for a whole array.
        size: The logical size of that dim.
    """

    array: Any
    dim: int | None = None
    size: int = 0


def dim_after_reduction(dim: int, reduced: Sequence[int]) -> int:
    """Returns where a dim is once others are gone."""
    return dim - sum(d < dim for d in reduced)


def _broadcast(shards: Shards, eqn: Any, x: Shard) -> Shard | None:
    dim = eqn.params["broadcast_dimensions"][x.dim]
    shape = list(eqn.params["shape"])
    shape[dim] = x.array.shape[x.dim]
    out = lax.broadcast_in_dim(
        x.array, tuple(shape), eqn.params["broadcast_dimensions"]
    )
    return Shard(out, dim, x.size)


def _reshape(shards: Shards, eqn: Any, x: Shard) -> Shard | None:
    """Keeps the cut where the cut dim survives as it is."""
    assert x.dim is not None
    old, new = eqn.invars[0].aval.shape, eqn.params["new_sizes"]
    before = math.prod(old[: x.dim])
    for dim, size in enumerate(new):
        if size == x.size and math.prod(new[:dim]) == before:
            shape = (*new[:dim], x.array.shape[x.dim], *new[dim + 1 :])
            return Shard(x.array.reshape(shape), dim, x.size)
    return None


def _squeeze(shards: Shards, eqn: Any, x: Shard) -> Shard | None:
    assert x.dim is not None
    dims = eqn.params["dimensions"]
    if x.dim in dims:
        return None
    return Shard(jnp.squeeze(x.array, dims), dim_after_reduction(x.dim, dims), x.size)


def _transpose(shards: Shards, eqn: Any, x: Shard) -> Shard | None:
    order = eqn.params["permutation"]
    return Shard(lax.transpose(x.array, order), order.index(x.dim), x.size)


def _reduce(
    fill: Callable[[Any], Any],
    over_shards: Callable[[Shards, Array], Array],
    *kinds: Any,
) -> Callable[[Shards, Any, Shard], Shard | None]:
    """Makes the rule of a reduction that no order can change."""

    def rule(shards: Shards, eqn: Any, x: Shard) -> Shard | None:
        assert x.dim is not None
        dims = eqn.params["axes"]
        dtype = x.array.dtype
        is_float = jnp.issubdtype(dtype, jnp.floating)
        if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            return None
        across = x.dim in dims
        array = x.array
        if across:
            array = shards.mask(array, x.dim, x.size, fill(dtype))
        if is_float:
            # Which of 0.0 and -0.0 is found would depend on the order.
            array = jnp.where(array == 0, jnp.zeros_like(array), array)
        [out] = results(eqn, [array])
        if is_float:
            is_nan = jnp.isnan(out)
            if across:
                # A maximum over devices may not see a NaN.
                is_nan = _pany(shards, is_nan)
                out = over_shards(shards, out)
            out = jnp.where(is_nan, jnp.nan, out).astype(dtype)
        elif across:
            out = over_shards(shards, out)
        if across:
            return Shard(out)
        return Shard(out, dim_after_reduction(x.dim, dims), x.size)

    return rule


def _lowest(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return -jnp.inf
    return False if dtype == jnp.bool_ else jnp.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.inf
    return True if dtype == jnp.bool_ else jnp.iinfo(dtype).max


def _pmin(shards: Shards, x: Array) -> Array:
    return x if shards.axis is None else lax.pmin(x, shards.axis)


def _pany(shards: Shards, x: Array) -> Array:
    return shards.pmax(x.astype(jnp.int32)).astype(x.dtype)


def _pall(shards: Shards, x: Array) -> Array:
    return _pmin(shards, x.astype(jnp.int32)).astype(x.dtype)


_ORDERED = (jnp.floating, jnp.integer, jnp.bool_)

RULES: dict[str, Callable[[Shards, Any, Shard], Shard | None]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "reduce_sum": _reduce(lambda _: 0, lambda shards, x: shards.psum(x), jnp.integer),
    "reduce_max": _reduce(_lowest, lambda shards, x: shards.pmax(x), *_ORDERED),
    "reduce_min": _reduce(_highest, _pmin, *_ORDERED),
    "reduce_or": _reduce(lambda _: False, _pany, jnp.bool_),
    "reduce_and": _reduce(lambda _: True, _pall, jnp.bool_),
}
