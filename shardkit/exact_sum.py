"""Float sums whose bits do not depend on order or grouping.

Owns the arithmetic behind exact consistency: a float is cut into integer digits on
a power-of-two grid, integers are added in whatever order is cheapest, and the total
is rounded to a float once. Invariant: the result is a function of the multiset of
addends alone. It knows nothing of meshes; a caller passes in the collectives.

Two forms: `exact_sum` for values that are all there (norms, factored moments,
metrics), and `Accumulator` for gradients that arrive one microbatch after another.

References:
    Demmel and Nguyen, Parallel Reproducible Summation (IEEE Trans. Comput. 2015).
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

__all__ = [
    "INITIAL_EXPONENT",
    "Accumulator",
    "exact_sum",
    "is_summable",
    "next_exponent",
    "peak_bits",
]

_DIGIT_BITS = 16
_NUM_DIGITS = 3
# Digits are at most 2**16 in size, so 2**13 of them stay well inside an int32.
_CHUNK = 1 << 13
_MIN_EXPONENT, _MAX_EXPONENT = -60, 120
INITIAL_EXPONENT = _MIN_EXPONENT
"""A grid that any real gradient outgrows, so that the first step finds its own."""
_MARGIN_BITS = 8


def _identity(x: Array) -> Array:
    return x


def _power_of_two(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """Builds 2**exponent exactly, for exponents from -126 to 127."""
    bits = (jnp.asarray(exponent, jnp.int32) + 127) << 23
    return lax.bitcast_convert_type(bits, jnp.float32)


def peak_bits(
    x: Float[Array, "..."], dims: Sequence[int] | None = None, keepdims: bool = False
) -> Int[Array, "..."]:
    """Returns the bits of the largest magnitude, as an int32.

    Magnitudes compare like their bits, and a NaN is larger than every number, so
    the maximum of the integers is exact, order-free and never loses a NaN.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF
    axis = None if dims is None else tuple(dims)
    return jnp.max(bits, axis=axis, keepdims=keepdims, initial=0)


def _exponent(bits: Int[Array, "..."]) -> Int[Array, "..."]:
    """Returns the smallest e with magnitude < 2**e, no less than the minimum."""
    return jnp.maximum((bits >> 23) - 126, _MIN_EXPONENT)


def exact_sum(
    x: Float[Array, "..."],
    dims: Sequence[int],
    *,
    pmax: Callable[[Array], Array] = _identity,
    psum: Callable[[Array], Array] = _identity,
) -> Float[Array, "..."]:
    """Sums over `dims`, and over devices, to bits that no order can change.

    The error is below 2⁻⁴⁶ of the largest magnitude per addend, plus the final
    rounding to float32.

    Args:
        x: The addends, of any float dtype of at most 32 bits.
        dims: Dims to sum over, all at least 0.
        pmax: Maximum over the devices that hold other addends of the same sums.
        psum: Integer sum over the same devices; at most 8192 of them.

    Returns:
        The sums in float32; NaN where an addend is not finite or reaches 2¹²⁰.

    Example:
        >>> x = jnp.array([1e8, 1.0, -1e8, 0.5])
        >>> float(exact_sum(x, [0])), float(exact_sum(x[::-1], [0]))
        (1.5, 1.5)
    """
    dims = sorted(dims)
    peak = pmax(peak_bits(x, dims, keepdims=True))
    exponent = _exponent(peak)
    # |rest| < 1: x over a power of two no smaller than the peak, hence exact.
    rest = x.astype(jnp.float32) * _power_of_two(-jnp.minimum(exponent, _MAX_EXPONENT))
    digits = []
    for _ in range(_NUM_DIGITS):
        rest = rest * 2.0**_DIGIT_BITS
        whole = jnp.round(rest)
        digits.append(whole.astype(jnp.int32))
        rest = rest - whole
    digits = [jnp.zeros_like(digits[0]), *digits]
    for dim in reversed(dims):
        digits = _sum_digits(digits, dim)
    digits = _carry([psum(digit) for digit in digits])
    total = jnp.zeros(digits[0].shape, jnp.float32)
    for place, digit in reversed(list(enumerate(digits))):
        total = total + digit.astype(jnp.float32) * 2.0 ** (-_DIGIT_BITS * place)
    total = total * _power_of_two(jnp.minimum(exponent, _MAX_EXPONENT))
    total = jnp.where(is_summable(peak), total, jnp.nan)
    return jnp.squeeze(total, axis=tuple(dims))


def _sum_digits(digits: list[Array], dim: int) -> list[Array]:
    """Sums digit arrays over `dim`, keeping it with size 1, carries resolved."""
    size = digits[0].shape[dim]
    if size > _CHUNK:
        num_chunks = -(-size // _CHUNK)
        digits = [_split(digit, dim, num_chunks) for digit in digits]
        digits = [jnp.squeeze(d, dim + 1) for d in _sum_digits(digits, dim + 1)]
        return _sum_digits(digits, dim)
    return _carry(
        [jnp.sum(d, axis=dim, keepdims=True, dtype=jnp.int32) for d in digits]
    )


def _split(x: Array, dim: int, num_chunks: int) -> Array:
    """Reshapes `dim` to `[num_chunks, chunk]`, zero-padded."""
    pad = [(0, 0)] * x.ndim
    pad[dim] = (0, num_chunks * _CHUNK - x.shape[dim])
    shape = (*x.shape[:dim], num_chunks, _CHUNK, *x.shape[dim + 1 :])
    return jnp.pad(x, pad).reshape(shape)


def _carry(digits: list[Array]) -> list[Array]:
    """Brings every digit but the first into [-2¹⁵, 2¹⁵), keeping the value."""
    digits = list(digits)
    half = 1 << (_DIGIT_BITS - 1)
    for place in range(len(digits) - 1, 0, -1):
        carry = (digits[place] + half) >> _DIGIT_BITS
        digits[place] = digits[place] - (carry << _DIGIT_BITS)
        digits[place - 1] = digits[place - 1] + carry
    return digits


def is_summable(peak: Int[Array, "..."]) -> Array:
    """Whether a peak is finite and small enough for a grid."""
    return _exponent(peak) <= _MAX_EXPONENT


def next_exponent(
    exponent: Int[Array, "..."], peak: Int[Array, "..."]
) -> tuple[Int[Array, "..."], Array]:
    """Chooses a leaf's grid from the peak just seen.

    Args:
        exponent: The grid in use: it holds magnitudes below 2**exponent.
        peak: `peak_bits` over all microbatches and devices.

    Returns:
        The exponent that leaves room for the peak to grow 256 times, and whether
        the grid in use was too small for this peak, so that its sum is void.
    """
    needed = _exponent(peak)
    known = (peak > 0) & is_summable(peak)
    wanted = jnp.minimum(needed + _MARGIN_BITS, _MAX_EXPONENT)
    return jnp.where(known, wanted, exponent), known & (needed > exponent)


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """Sums a fixed number of arrays in two int32 limbs per element.

    The grid spans `2**exponent` down to about `2**(exponent - 61 + 2 log2 n)`: 51
    bits for 24 addends, where a float32 sum keeps 24. Both limbs can be summed
    over devices as integers, in any order, before `total`.

    Attributes:
        num_addends: How many arrays are added at most, over all devices.

    Example:
        >>> sums = Accumulator(num_addends=4)
        >>> limbs = sums.zeros((2,))
        >>> for value in (0.25, 0.5, -0.125):
        ...     limbs = sums.add(limbs, jnp.full((2,), value), jnp.int32(0))
        >>> sums.total(limbs, jnp.int32(0))
        Array([0.625, 0.625], dtype=float32)
    """

    num_addends: int

    @property
    def _bits(self) -> tuple[int, int]:
        log2 = max(self.num_addends - 1, 0).bit_length()
        return 30 - log2, 31 - log2

    def zeros(self, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Returns the limbs of an empty sum."""
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32)

    def add(
        self, limbs: tuple[Array, Array], x: Array, exponent: Int[Array, ""]
    ) -> tuple[Array, Array]:
        """Adds `x`, whose magnitudes must be below `2**exponent`."""
        high_bits, low_bits = self._bits
        scaled = x.astype(jnp.float32) * _power_of_two(high_bits - exponent)
        high = jnp.round(scaled)
        low = jnp.round((scaled - high) * 2.0**low_bits)
        return limbs[0] + high.astype(jnp.int32), limbs[1] + low.astype(jnp.int32)

    def total(
        self, limbs: tuple[Array, Array], exponent: Int[Array, ""]
    ) -> Float[Array, "..."]:
        """Rounds the sum to float32."""
        high_bits, low_bits = self._bits
        high, low = limbs
        carry = (low + (1 << (low_bits - 1))) >> low_bits
        high = (high + carry).astype(jnp.float32)
        low = (low - (carry << low_bits)).astype(jnp.float32)
        unit = _power_of_two(exponent - high_bits)
        return high * unit + low * (unit * 2.0**-low_bits)
