"""Float sums whose bits do not depend on order or grouping.

Owns the arithmetic behind exact consistency: a float is cut into integer digits on
a power-of-two grid, integers are added in whatever order is cheapest, and only the
total is rounded to a float. Invariant: the result is a function of the multiset of
addends alone. It knows nothing of meshes; a caller passes in the collectives.

Two forms: `exact_sum` for values that are all there (norms, factored moments,
metrics), and `Accumulator` for gradients that arrive one microbatch after another.

References:
    Demmel and Nguyen, Parallel Reproducible Summation (IEEE Trans. Comput. 2015).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from shardkit.errors import ConfigError
from shardkit.shards import pad_dim

__all__ = [
    "INITIAL_EXPONENT",
    "Accumulator",
    "exact_sum",
    "exact_sums",
    "is_summable",
    "next_exponent",
    "peak_bits",
]

_DIGIT_BITS = 16
_NUM_DIGITS = 3
# Digits are at most 2**16 in size, so 2**13 of them stay well inside an int32.
_CHUNK = 1 << 13
_HALF = 1 << (_DIGIT_BITS - 1)
_MIN_EXPONENT, _MAX_EXPONENT = -60, 120
INITIAL_EXPONENT = _MIN_EXPONENT
"""A grid that any real gradient outgrows, so that the first step finds its own."""
_MARGIN_BITS = 8
# The most for which an addend as large as the last step's peak, whose grid has the
# whole margin above it, still keeps 25 bits: a float32's, and one to round.
_MAX_ADDENDS = 1 << 14


def _identity(x: Array) -> Array:
    return x


def _power_of_two(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """Builds 2**exponent exactly, for exponents from -126 to 127."""
    bits = (jnp.asarray(exponent, jnp.int32) + 127) << 23
    return lax.bitcast_convert_type(bits, jnp.float32)


def peak_bits(
    x: Float[Array, "..."], dims: Sequence[int] | None = None
) -> Int[Array, "..."]:
    """Returns the bits of the largest magnitude, as an int32.

    Magnitudes compare like their bits, and a NaN is larger than every number, so
    the maximum of the integers is exact, order-free and never loses a NaN.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF
    axis = None if dims is None else tuple(dims)
    return jnp.max(bits, axis=axis, initial=0)


def _exponent(bits: Int[Array, "..."]) -> Int[Array, "..."]:
    """Returns the smallest e with magnitude < 2**e, no less than the minimum."""
    return jnp.maximum((bits >> 23) - 126, _MIN_EXPONENT)


def exact_sum(
    x: Float[Array, "..."],
    dims: Sequence[int],
    *,
    pmax: Callable[[Array], Array] = _identity,
    psum: Callable[[Array], Array] = _identity,
    merges: bool = True,
) -> Float[Array, "..."]:
    """Sums over `dims`, and over devices, to bits that no order can change.

    The error is below 2⁻⁴⁶ of the largest magnitude (or of 2⁻⁶⁰, if that is larger)
    per addend, plus the final rounding to float32.

    Args:
        x: The addends, of any float dtype of at most 32 bits.
        dims: Dims to sum over, all at least 0.
        pmax: Maximum over the devices that hold other addends of the same sums.
        psum: Integer sum over the same devices; at most 8192 of them.
        merges: Whether dims may become one, which is faster; not where the compiler
            cuts some, as it would make them whole. The bits are the same.

    Returns:
        The sums in float32; NaN where an addend is not finite or reaches 2¹²⁰.

    Example:
        >>> x = jnp.array([1e8, 1.0, -1e8, 0.5])
        >>> float(exact_sum(x, [0])), float(exact_sum(x[::-1], [0]))
        (1.5, 1.5)
    """
    return exact_sums([(x, dims)], pmax=pmax, psum=psum, merges=merges)[0]


def exact_sums(
    addends: Sequence[tuple[Float[Array, "..."], Sequence[int]]],
    *,
    pmax: Callable[[Array], Array] = _identity,
    psum: Callable[[Array], Array] = _identity,
    merges: bool = True,
) -> list[Float[Array, "..."]]:
    """Computes several `exact_sum`s with one `pmax` and one `psum` for all.

    Args:
        addends: Pairs of an array and the dims to sum over.
        pmax: As in `exact_sum`.
        psum: As in `exact_sum`.
        merges: As in `exact_sum`.
    """
    moved = [_kept_first(x, dims, merges=merges) for x, dims in addends]
    shapes = [shape for _, shape in moved]
    found = [peak_bits(x, range(len(shape), x.ndim)) for x, shape in moved]
    peaks = _unpack(pmax(_pack(found)), shapes)
    digits = [_digits(x, peak) for (x, _), peak in zip(moved, peaks, strict=True)]
    packed = psum(jnp.concatenate(digits, axis=1))
    totals = _unpack(_round_digits(list(packed), _pack(peaks)), shapes)
    return [
        total.reshape([n for dim, n in enumerate(x.shape) if dim not in dims])
        for total, (x, dims) in zip(totals, addends, strict=True)
    ]


def _kept_first(
    x: Array, dims: Sequence[int], *, merges: bool
) -> tuple[Float[Array, "*kept_then_summed"], tuple[int, ...]]:
    """Brings the dims to sum over last; also returns the shape of the rest."""
    kept = [dim for dim in range(x.ndim) if dim not in dims]
    shape = tuple(x.shape[dim] for dim in kept)
    x = jnp.transpose(x.astype(jnp.float32), (*kept, *sorted(dims)))
    if merges or not dims:
        num_summed = math.prod(x.shape[len(kept) :])
        shape = (math.prod(shape),)
        x = x.reshape(*shape, num_summed)
    return x, shape


def _pack(parts: list[Array]) -> Array:
    return jnp.concatenate([part.reshape(-1) for part in parts])


def _unpack(packed: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Undoes `_pack`."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = jnp.split(packed, ends[:-1].tolist())
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _digits(
    x: Float[Array, "*kept_then_summed"], peak: Int[Array, "*kept"]
) -> Int[Array, "digits kept"]:
    """Cuts every addend into digits below its peak, and sums those in this array."""
    x = _in_chunks(x)
    # |rest| < 1: x over a power of two no smaller than the peak, hence exact.
    exponent = jnp.minimum(_exponent(peak), _MAX_EXPONENT)
    factor = _power_of_two(-exponent)
    rest = x * factor.reshape(*factor.shape, *[1] * (x.ndim - peak.ndim))
    digits = []
    for _ in range(_NUM_DIGITS):
        rest = rest * 2.0**_DIGIT_BITS
        whole = jnp.round(rest)
        digits.append(jnp.sum(whole.astype(jnp.int32), axis=-1, dtype=jnp.int32))
        rest = rest - whole
    sums = _carry_once(jnp.stack([jnp.zeros_like(digits[0]), *digits]))
    while sums.ndim > 1 + peak.ndim:
        if sums.shape[-1] == 1:
            sums = jnp.squeeze(sums, -1)
            continue
        sums = jnp.sum(_in_chunks(sums), axis=-1, dtype=jnp.int32)
        sums = _carry_once(sums)
    return sums.reshape(_NUM_DIGITS + 1, -1)


def _in_chunks(x: Array) -> Array:
    """Cuts the last dim into two, of which the last can be summed at once."""
    size = x.shape[-1]
    length = max(1, min(size, _CHUNK))
    num_chunks = max(1, -(-size // length))
    x = pad_dim(x, x.ndim - 1, num_chunks * length)
    return x.reshape(*x.shape[:-1], num_chunks, length)


def _carry_once(digits: Int[Array, "digits ..."]) -> Int[Array, "digits ..."]:
    """Brings digits below 2³⁰ under 2¹⁶, all but the first, keeping the value."""
    carry = (digits[1:] + _HALF) >> _DIGIT_BITS
    rest = digits[1:] - (carry << _DIGIT_BITS)
    zero = jnp.zeros_like(carry[:1])
    return jnp.concatenate([digits[:1], rest]) + jnp.concatenate([carry, zero])


def _round_digits(
    digits: list[Int[Array, " sums"]], peak: Int[Array, " sums"]
) -> Float[Array, " sums"]:
    """Rounds sums to float32; equal values give equal bits, whatever their digits."""
    digits = list(digits)
    for place in range(len(digits) - 1, 0, -1):
        carry = (digits[place] + _HALF) >> _DIGIT_BITS
        digits[place] = digits[place] - (carry << _DIGIT_BITS)
        digits[place - 1] = digits[place - 1] + carry
    total = jnp.zeros(peak.shape, jnp.float32)
    for place, digit in reversed(list(enumerate(digits))):
        total = total + digit.astype(jnp.float32) * 2.0 ** (-_DIGIT_BITS * place)
    total = total * _power_of_two(jnp.minimum(_exponent(peak), _MAX_EXPONENT))
    return jnp.where(is_summable(peak), total, jnp.nan)


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

    Raises:
        ConfigError: For more than 16384 addends. With so many, what `next_exponent`
            leaves free above a peak and 25 bits below it still fit in the grid; with
            more, a sum would keep less than float32 addends have.

    Example:
        >>> sums = Accumulator(num_addends=4)
        >>> limbs = sums.zeros((2,))
        >>> for value in (0.25, 0.5, -0.125):
        ...     limbs = sums.add(limbs, jnp.full((2,), value), jnp.int32(0))
        >>> sums.total(limbs, jnp.int32(0))
        Array([0.625, 0.625], dtype=float32)
    """

    num_addends: int

    def __post_init__(self):
        if self.num_addends > _MAX_ADDENDS:
            raise ConfigError(
                f"num_microbatches: expected at most {_MAX_ADDENDS}, as exact sums of "
                f"more would keep fewer bits than float32, found {self.num_addends}. "
                "Make the microbatches larger, or use consistency = 'fast'."
            )

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
        # Rounds to nearest without leaving int32, as one addend may take all of it.
        carry = ((low >> (low_bits - 1)) + 1) >> 1
        high = (high + carry).astype(jnp.float32)
        low = (low - (carry << low_bits)).astype(jnp.float32)
        unit = _power_of_two(exponent - high_bits)
        return high * unit + low * (unit * 2.0**-low_bits)
