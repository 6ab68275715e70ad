"""Where a value is rounded, whatever the compiler fuses it with.

Owns the trick that keeps a product and a following sum from becoming one operation
that rounds once. Which products a compiler fuses so depends on the shape of the loop
around them, so the bits of `a * b + c * d` would depend on how an array is cut.
"""

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["opaque_zero", "unfused"]


def opaque_zero(count: Array) -> Array:
    """Returns an int32 zero, from a count of which only we know that it is not < 0."""
    return count >> 31


def unfused(x: Array, zero: Array) -> Array:
    """Returns `x`, computed and rounded before anything is added to it.

    Args:
        x: A product.
        zero: An int32 zero unknown to the compiler.
    """
    width = jnp.dtype(x.dtype).itemsize
    if not jnp.issubdtype(x.dtype, jnp.floating) or width not in (2, 4):
        return x
    integer = jnp.int16 if width == 2 else jnp.int32
    bits = lax.bitcast_convert_type(x, integer) ^ zero.astype(integer)
    return lax.bitcast_convert_type(bits, x.dtype)
