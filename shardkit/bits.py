"""Arrays as integers, for programs that only copy.

Owns what a compiler may not take for numbers while it moves them. Some backends widen
small floats for every operation, and so alter NaNs, or pack what is smaller than a byte
and lose count. Invariant: `of_bits(as_bits(x), x.dtype)` is `x`, to the bit. It knows
nothing of devices.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["as_bits", "is_packed", "of_bits"]

_MAX_WIDENED_BITS = 16


def as_bits(x: Array) -> Array:
    """Views small floats as integers, and widens what is smaller than a byte.

    Example:
        >>> as_bits(jnp.ones(2, jnp.bfloat16)).dtype, as_bits(jnp.ones(2)).dtype
        (dtype('uint16'), dtype('float32'))
    """
    if jnp.issubdtype(x.dtype, jnp.floating):
        width = jnp.finfo(x.dtype).bits
        if width > _MAX_WIDENED_BITS:
            return x
        x = lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    return x.astype(_wide(x.dtype))


def of_bits(x: Array, dtype: Any) -> Array:
    """Undoes `as_bits`."""
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        return x.astype(dtype)
    width = jnp.finfo(dtype).bits
    if width > _MAX_WIDENED_BITS:
        return x
    return lax.bitcast_convert_type(x.astype(jnp.dtype(f"uint{width}")), dtype)


def is_packed(dtype: Any) -> bool:
    """Whether elements are smaller than a byte.

    Example:
        >>> is_packed(jnp.int4), is_packed(jnp.int8), is_packed(jnp.bool_)
        (True, False, False)
    """
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits < 8
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8


def _wide(dtype: Any) -> Any:
    """The smallest integers of whole bytes; any other dtype is its own."""
    if not is_packed(dtype):
        return dtype
    return jnp.int8 if jnp.issubdtype(dtype, jnp.signedinteger) else jnp.uint8
