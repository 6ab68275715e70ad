"""How far two arrays are from one another.

Owns what is counted, element by element. Invariant: elements are the same if their
bits are, so that -0 differs from 0 and one NaN from another.
"""

import dataclasses

import numpy as np

from shardkit.checkpoint.views import as_bits, is_floating

__all__ = ["Difference"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """What is known of the differences so far.

    Attributes:
        num_elements: How many differ.
        max_abs: The largest difference of two finite elements; None if there is none.
        max_ulp: The most representable numbers from one element to its other; None for
            what is no real number with an order of its own.
        num_not_finite: How many of those that differ are infinite or no number, on
            either side.
    """

    num_elements: int = 0
    max_abs: float | int | None = None
    max_ulp: int | None = None
    num_not_finite: int = 0

    @classmethod
    def none(cls, dtype: np.dtype) -> "Difference":
        """Where the comparison of two arrays of a dtype begins."""
        return cls(max_ulp=0 if is_floating(dtype) else None)

    def joined(self, a: np.ndarray, b: np.ndarray) -> "Difference":
        """Adds what is found in two arrays of one shape and dtype.

        >>> one, other = np.float32([1, 2, 3]), np.float32([1, 2.5, 3])
        >>> Difference.none(one.dtype).joined(one, other)
        Difference(num_elements=1, max_abs=0.5, max_ulp=2097152, num_not_finite=0)
        """
        differs = (as_bits(a) != as_bits(b)).any(-1)
        num = int(differs.sum())
        if not num:
            return self
        a, b = a[differs], b[differs]
        wide = np.complex128 if a.dtype.kind == "c" else np.float64
        finite = np.ones(num, bool)
        if is_floating(a.dtype) or a.dtype.kind == "c":
            x, y = a.astype(wide), b.astype(wide)
            finite = np.isfinite(x) & np.isfinite(y)
            # Finite numbers may be further apart than the largest of them.
            with np.errstate(over="ignore"):
                gaps = np.abs(x[finite] - y[finite])
            gap = float(gaps.max()) if len(gaps) else None
        else:
            gap = int(_ranks_apart(a, b).max())
        ulp = self.max_ulp
        if ulp is not None and finite.any():
            ulp = max(ulp, int(_ranks_apart(a[finite], b[finite]).max()))
        known = [each for each in (self.max_abs, gap) if each is not None]
        return Difference(
            self.num_elements + num,
            max(known, default=None),
            ulp,
            self.num_not_finite + int((~finite).sum()),
        )


def _ranks_apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many representable numbers lie from each element to its other: uint64."""
    x, y = _ranks(a), _ranks(b)
    return np.where(x > y, x - y, y - x)


def _ranks(x: np.ndarray) -> np.ndarray:
    """Numbers elements in their order, from 0 on."""
    if x.dtype.kind == "b":
        return x.astype(np.uint64)
    if not is_floating(x.dtype):
        # Two's complement: the same differences from any beginning.
        wide = x.astype(np.uint64) if x.dtype.name.startswith("u") else None
        if wide is not None:
            return wide
        return x.astype(np.int64).view(np.uint64) ^ np.uint64(1 << 63)
    bits = as_bits(x)[..., 0].astype(np.uint64)
    sign = np.uint64(1 << (8 * x.dtype.itemsize - 1))
    return np.where(bits & sign, sign - 1 - (bits ^ sign), bits | sign)
