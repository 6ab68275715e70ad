"""Where a value is rounded, whatever the compiler fuses it with.

Owns the trick that keeps a product and a following sum from becoming one operation
that rounds once. Which products a compiler fuses so depends on the shape of the loop
around them, so the bits of `a * b + c * d` would depend on how an array is cut.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["is_guarded", "not_broadcast", "opaque_zero", "unfused"]


def opaque_zero(count: Array) -> Array:
    """Returns an int32 zero, from a count of which only we know that it is not < 0."""
    return count >> 31


def _integer(dtype: Any) -> Any:
    """Returns the integers in which bits of this float dtype are told, if any."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    bits = {8: jnp.int8, 16: jnp.int16, 32: jnp.int32, 64: jnp.int64}
    return bits.get(jnp.finfo(dtype).bits)


def is_guarded(dtype: Any) -> bool:
    """Whether products of this dtype can be kept from being fused with sums.

    >>> is_guarded(jnp.float32), is_guarded(jnp.int8), is_guarded(jnp.complex64)
    (True, True, False)
    """
    return not jnp.issubdtype(dtype, jnp.inexact) or _integer(dtype) is not None


def not_broadcast(divisor: Array, numerator: Array, zero: Array) -> Array:
    """Returns a divisor that the compiler cannot know to be the same everywhere.

    It would multiply by the inverse of one scalar instead of dividing by it, but only
    where an array has more than one element.

    Args:
        divisor: What is divided by.
        numerator: What is divided.
        zero: An int32 zero unknown to the compiler.
    """
    integer = _integer(divisor.dtype)
    if integer is None:
        return divisor
    shape = jnp.broadcast_shapes(jnp.shape(divisor), jnp.shape(numerator))
    bits = lax.bitcast_convert_type(jnp.broadcast_to(divisor, shape), integer)
    # The numerator may be the same everywhere too, so the place is in it as well; the
    # place alone does not keep the compiler from it.
    other = lax.bitcast_convert_type(jnp.broadcast_to(numerator, shape), integer)
    place = lax.iota(jnp.int32, math.prod(shape)).reshape(shape).astype(integer)
    bits = bits ^ ((other ^ place) & zero.astype(integer))
    return lax.bitcast_convert_type(bits, divisor.dtype)


def unfused(x: Array, zero: Array) -> Array:
    """Returns `x`, computed and rounded before anything is added to it.

    Args:
        x: A product.
        zero: An int32 zero unknown to the compiler.
    """
    integer = _integer(x.dtype)
    if integer is None:
        return x
    bits = lax.bitcast_convert_type(x, integer) ^ zero.astype(integer)
    return lax.bitcast_convert_type(bits, x.dtype)
