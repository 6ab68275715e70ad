"""Views of other views that move elements and leave their bits alone.

Owns transposing, slicing, indexing, joining, stacking and filling; `reshape_view` has
the one that is harder. Invariant: a box is made of just the source boxes it shows, and
besides what was asked for there is one source box in memory at a time.
"""

from collections.abc import Sequence
from math import isfinite

import numpy as np

from shardkit.checkpoint.views import Box, View, box_shape, is_floating
from shardkit.errors import ConfigError

__all__ = [
    "ConcatView",
    "FillView",
    "IndexView",
    "SliceView",
    "StackView",
    "TransposeView",
]

# A tile of a transpose: what is read in one go, and what is written in one go.
_READ, _WRITTEN = 64, 16


class TransposeView(View):
    """A view whose dim `k` is the source's dim `dims[k]`."""

    def __init__(self, source: View, dims: Sequence[int]) -> None:
        assert sorted(dims) == list(range(len(source.shape)))
        self._source, self._dims = source, tuple(dims)
        self.shape = tuple(source.shape[dim] for dim in dims)
        self.dtype = source.dtype

    def read(self, box: Box) -> np.ndarray:
        """Reads the box with its dims put back: see `View.read`."""
        parts = dict(zip(self._dims, box, strict=True))
        found = self._source.read(tuple(parts[dim] for dim in sorted(parts)))
        return _contiguous(found.transpose(self._dims))


class SliceView(View):
    """What a view has from `start` to `stop` along one dim."""

    def __init__(self, source: View, dim: int, start: int, stop: int) -> None:
        assert 0 <= start <= stop <= source.shape[dim]
        self._source, self._dim, self._start = source, dim, start
        shape = source.shape
        self.shape = (*shape[:dim], stop - start, *shape[dim + 1 :])
        self.dtype = source.dtype

    def read(self, box: Box) -> np.ndarray:
        """Reads the box, moved by the start: see `View.read`."""
        return self._source.read(_moved(box, self._dim, self._start))


class IndexView(View):
    """One element of a view along a dim, which is gone."""

    def __init__(self, source: View, dim: int, index: int) -> None:
        assert 0 <= index < source.shape[dim]
        self._source, self._dim, self._index = source, dim, index
        self.shape = source.shape[:dim] + source.shape[dim + 1 :]
        self.dtype = source.dtype

    def read(self, box: Box) -> np.ndarray:
        """Reads a box that is 1 wide along the dim: see `View.read`."""
        one = (self._index, self._index + 1)
        found = self._source.read((*box[: self._dim], one, *box[self._dim :]))
        return found.reshape(box_shape(box))


class ConcatView(View):
    """Views one after the other along a dim they have."""

    def __init__(self, sources: Sequence[View], dim: int) -> None:
        self._sources, self._dim = list(sources), dim
        shape = sources[0].shape
        total = sum(source.shape[dim] for source in sources)
        self.shape = (*shape[:dim], total, *shape[dim + 1 :])
        self.dtype = sources[0].dtype

    def read(self, box: Box) -> np.ndarray:
        """Reads from the sources that the box meets: see `View.read`."""
        start, stop = box[self._dim]
        out, offset = None, 0
        for source in self._sources:
            size = source.shape[self._dim]
            low, high = max(start - offset, 0), min(stop - offset, size)
            if low < high:
                part = source.read(_replaced(box, self._dim, (low, high)))
                if high - low == stop - start:
                    return part
                if out is None:
                    out = np.empty(box_shape(box), self.dtype)
                at = low + offset - start
                _along(out, self._dim)[at : at + high - low] = _along(part, self._dim)
            offset += size
        return np.empty(box_shape(box), self.dtype) if out is None else out


class StackView(View):
    """Views of one shape, one after the other along a dim they do not have."""

    def __init__(self, sources: Sequence[View], dim: int) -> None:
        self._sources, self._dim = list(sources), dim
        shape = sources[0].shape
        self.shape = (*shape[:dim], len(sources), *shape[dim:])
        self.dtype = sources[0].dtype

    def read(self, box: Box) -> np.ndarray:
        """Reads from one source after the other: see `View.read`."""
        start, stop = box[self._dim]
        rest = box[: self._dim] + box[self._dim + 1 :]
        if stop - start == 1:
            return self._sources[start].read(rest).reshape(box_shape(box))
        out = np.empty(box_shape(box), self.dtype)
        for index in range(start, stop):
            _along(out, self._dim)[index - start] = self._sources[index].read(rest)
        return out


class FillView(View):
    """One value everywhere."""

    def __init__(
        self, shape: Sequence[int], dtype: np.dtype, value: bool | int | float
    ) -> None:
        self.shape, self.dtype, self._value = tuple(shape), dtype, value
        try:
            held = float(np.full((), value, dtype))
            exact = held == value
            fits = exact or (is_floating(dtype) and isfinite(held) == isfinite(value))
        except (OverflowError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ConfigError(f"{dtype.name} cannot hold the value {value}")

    def read(self, box: Box) -> np.ndarray:
        """Makes the box: see `View.read`."""
        return np.full(box_shape(box), self._value, self.dtype)


def _along(array: np.ndarray, dim: int) -> np.ndarray:
    return np.moveaxis(array, dim, 0)


def _replaced(box: Box, dim: int, part: tuple[int, int]) -> Box:
    return (*box[:dim], part, *box[dim + 1 :])


def _moved(box: Box, dim: int, by: int) -> Box:
    start, stop = box[dim]
    return _replaced(box, dim, (start + by, stop + by))


def _contiguous(array: np.ndarray) -> np.ndarray:
    """Copies in tiles, which is faster, if rows of the copy are far apart."""
    strides = [abs(step) for step in array.strides]
    fastest = int(np.argmin(strides)) if array.size > _READ * _WRITTEN else -1
    if array.flags.c_contiguous or fastest in (-1, array.ndim - 1):
        return np.ascontiguousarray(array).reshape(array.shape)
    out = np.empty(array.shape, array.dtype)
    source, copy = array, out
    if array.dtype.itemsize <= 8:
        # numpy copies integers faster than the small floats of others.
        source, copy = (each.view(f"u{array.dtype.itemsize}") for each in (array, out))
    for start in range(0, array.shape[fastest], _READ):
        rows = (slice(None),) * fastest + (slice(start, start + _READ),)
        for first in range(0, array.shape[-1], _WRITTEN):
            tile = (*rows, ..., slice(first, first + _WRITTEN))
            copy[tile] = source[tile]
    return out
