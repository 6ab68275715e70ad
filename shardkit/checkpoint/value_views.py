"""Views of other views whose values differ from theirs.

Owns casts, weighted means, copies that must agree, and random numbers. Invariant: an
element depends on the source elements at its place alone, and is rounded once, so its
bits do not depend on the boxes that are read.

References:
    Boldo & Melquiond, Emulation of FMA and Correctly Rounded Sums: Proved Algorithms
    Using Rounding to Odd (IEEE TC 2008): one rounding through a wider format.
    Steele, Lea & Flood, Fast Splittable Pseudorandom Number Generators (OOPSLA 2014).
"""

import math
import zlib
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from shardkit.checkpoint.views import Box, View, as_bits, box_shape, is_floating
from shardkit.errors import ConfigError, RestoreError

__all__ = [
    "CastView",
    "EqualView",
    "MeanView",
    "NormalView",
    "is_lossless",
    "round_once",
]


class CastView(View):
    """A view in another dtype: floats rounded to nearest, integers as they are.

    Raises:
        ConfigError: If integers would be narrowed, or kinds mixed.
    """

    def __init__(self, source: View, dtype: np.dtype) -> None:
        floats = is_floating(source.dtype) and is_floating(dtype)
        if not floats and not is_lossless(source.dtype, dtype):
            raise ConfigError(
                f"{source.dtype.name} cannot be cast to {dtype.name} without loss: "
                "floats become other floats, and integers wider ones"
            )
        self._source, self.shape, self.dtype = source, source.shape, dtype

    def read(self, box: Box) -> np.ndarray:
        """Reads and rounds.

        Raises:
            RestoreError: If something finite is too large for the dtype.
        """
        found = self._source.read(box)
        # Some NaNs are signals, which a cast answers.
        with np.errstate(all="ignore"):
            if is_lossless(self._source.dtype, self.dtype):
                return found.astype(self.dtype)
            out = round_once(found.astype(np.float64), self.dtype)
        lost = np.isfinite(found) & ~np.isfinite(out)
        if lost.any():
            raise RestoreError(
                f"{int(lost.sum())} of {found.size} values are too large for "
                f"{self.dtype.name}: the first is {found[lost][0]}. Keep "
                f"{self._source.dtype.name} for this leaf."
            )
        return out


class MeanView(View):
    """The weighted mean of views of floats of one shape and dtype.

    Elements on which all sources agree to the bit keep their bits.
    """

    def __init__(self, sources: Sequence[View], weights: Sequence[float]) -> None:
        # What weighs nothing is not read: an infinity times zero would be no number.
        pairs = [(s, w) for s, w in zip(sources, weights, strict=True) if w]
        total = math.fsum(weight for _, weight in pairs)
        self._sources = [source for source, _ in pairs]
        self._weights = [weight / total for _, weight in pairs]
        self.shape, self.dtype = sources[0].shape, sources[0].dtype

    def read(self, box: Box) -> np.ndarray:
        """Reads one source after the other into a sum in float64: see `View.read`."""
        first = self._sources[0].read(box)
        if len(self._sources) == 1:
            return first
        with np.errstate(all="ignore"):
            total = first.astype(np.float64) * self._weights[0]
            same = np.ones((*first.shape, 1), bool)
            for source, weight in zip(
                self._sources[1:], self._weights[1:], strict=True
            ):
                other = source.read(box)
                same &= as_bits(other) == as_bits(first)
                scaled = other.astype(np.float64)
                scaled *= weight
                total += scaled
        return np.where(same.all(-1), first, round_once(total, self.dtype))


class EqualView(View):
    """A view of which there are copies that must be the same to the bit."""

    def __init__(self, sources: Sequence[View]) -> None:
        self._sources = list(sources)
        self.shape, self.dtype = sources[0].shape, sources[0].dtype

    def read(self, box: Box) -> np.ndarray:
        """Reads all copies.

        Raises:
            RestoreError: If they differ.
        """
        first = self._sources[0].read(box)
        for number, source in enumerate(self._sources[1:], 1):
            same = (as_bits(source.read(box)) == as_bits(first)).all(-1)
            if not same.all():
                raise RestoreError(
                    f"{int((~same).sum())} of {first.size} elements of copy {number} "
                    f"of a leaf {self.describe()} differ from copy 0; expected equal "
                    "copies, as only floats can be averaged. Take one of them."
                )
        return first


class NormalView(View):
    """Normal numbers that are a function of seed, name and place alone."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: np.dtype,
        scale: float,
        seed: int,
        name: str,
    ) -> None:
        if not is_floating(dtype):
            raise ConfigError(f"normal numbers need a float dtype, found {dtype.name}")
        self.shape, self.dtype, self._scale = tuple(shape), dtype, scale
        start = zlib.crc32(name.encode()) << 32 | zlib.crc32(b"%d" % seed)
        self._start = _mix(np.array([start], np.uint64))

    def read(self, box: Box) -> np.ndarray:
        """Draws the box by the Box-Muller transform: see `View.read`."""
        place, stride = np.zeros((), np.uint64), 1
        for dim, (start, stop) in reversed(list(enumerate(box))):
            offsets = np.arange(start, stop, dtype=np.uint64) * np.uint64(stride)
            place = place + offsets.reshape(-1, *[1] * (len(box) - 1 - dim))
            stride *= self.shape[dim]
        bits = _mix(_mix(place.reshape(-1)) ^ self._start)
        u = ((bits >> np.uint64(11)) + 1).astype(np.float64) * 2.0**-53
        v = (_mix(bits) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        drawn = self._scale * np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)
        return round_once(drawn.reshape(box_shape(box)), self.dtype)


def round_once(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounds float64 to another float dtype, to nearest and ties to even.

    `ml_dtypes` rounds to float32 on the way, and so would round twice.

    >>> from shardkit.checkpoint.views import as_dtype
    >>> above_tie = np.array(1 + 2.0**-8 + 2.0**-40)
    >>> float(above_tie.astype(as_dtype("bfloat16")))
    1.0
    >>> float(round_once(above_tie, as_dtype("bfloat16")))
    1.0078125
    """
    with np.errstate(all="ignore"):
        if dtype.isbuiltin == 1:
            return x.astype(dtype)
        near = np.asarray(x.astype(np.float32))
        back = near.astype(np.float64)
        bits = near.view(np.uint32)
        # To odd: toward zero, with the last bit set if anything was cut off.
        toward_zero = bits - (np.abs(back) > np.abs(x)).astype(np.uint32)
        inexact = (back != x) & ~np.isnan(x)
        bits = np.where(inexact, toward_zero | np.uint32(1), bits)
        return bits.view(np.float32).astype(dtype)


def is_lossless(source: np.dtype, target: np.dtype) -> bool:
    """Whether every number of one dtype is one of another.

    >>> is_lossless(np.dtype("float16"), np.dtype("float32"))
    True
    """
    if source == target:
        return True
    if is_floating(source) and is_floating(target):
        inner, outer = ml_dtypes.finfo(source), ml_dtypes.finfo(target)
        return bool(
            inner.nmant <= outer.nmant
            and float(outer.smallest_subnormal) <= float(inner.smallest_subnormal)
            and float(outer.max) >= float(inner.max)
        )
    try:
        small, large = _bounds(source), _bounds(target)
    except ValueError:
        return False
    return large[0] <= small[0] and small[1] <= large[1]


def _bounds(dtype: np.dtype) -> tuple[int, int]:
    info = ml_dtypes.iinfo(dtype)
    return int(info.min), int(info.max)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, after one step of its counter."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
