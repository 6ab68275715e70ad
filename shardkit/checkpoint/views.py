"""Logical arrays that are read box by box.

Owns what an array is to everything that reads, writes or remaps checkpoints: a shape,
a dtype and boxes that can be asked for. Invariant: nothing is read before it is asked
for, and what is read for a box is a small multiple of that box. It knows nothing of
files or devices, and needs no JAX.
"""

import abc
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from shardkit.errors import ConfigError

__all__ = [
    "ArrayView",
    "Box",
    "View",
    "as_bits",
    "as_dtype",
    "box_shape",
    "box_slices",
    "is_floating",
    "iter_boxes",
    "whole_box",
]

Box = tuple[tuple[int, int], ...]
"""`(start, stop)` for every dim."""


class View(abc.ABC):
    """An array of which boxes can be read.

    Attributes:
        shape: The logical shape.
        dtype: The dtype of the elements; those numpy lacks are of `ml_dtypes`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @abc.abstractmethod
    def read(self, box: Box) -> np.ndarray:
        """Reads one box.

        Args:
            box: `(start, stop)` for every dim, within the shape.

        Returns:
            The elements, C-contiguous, of the shape of the box. They may be shared with
            the view: write into a copy.
        """

    @property
    def nbytes(self) -> int:
        """The bytes of all elements in memory, where the smallest takes one byte."""
        return math.prod(self.shape) * self.dtype.itemsize

    def describe(self) -> str:
        """Spells dtype and shape.

        >>> ArrayView(np.zeros((2, 3), np.float32)).describe()
        'float32[2, 3]'
        """
        return f"{self.dtype.name}{list(self.shape)}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.describe()})"


class ArrayView(View):
    """An array in memory.

    >>> ArrayView(np.arange(6).reshape(2, 3)).read(((0, 2), (1, 2))).tolist()
    [[1], [4]]
    """

    def __init__(self, array: np.ndarray) -> None:
        self._array = np.asarray(array)
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def read(self, box: Box) -> np.ndarray:
        """Cuts the box out: see `View.read`."""
        return np.asarray(self._array[box_slices(box)], order="C")


def whole_box(shape: tuple[int, ...]) -> Box:
    """Returns the box that is everything.

    >>> whole_box((2, 3))
    ((0, 2), (0, 3))
    """
    return tuple((0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """Returns the shape of what a box holds.

    >>> box_shape(((1, 4), (0, 2)))
    (3, 2)
    """
    return tuple(stop - start for start, stop in box)


def box_slices(box: Box) -> tuple[slice, ...]:
    """Returns a box as an index."""
    return tuple(slice(start, stop) for start, stop in box)


def iter_boxes(
    shape: tuple[int, ...], itemsize: int, limit_bytes: int
) -> Iterator[Box]:
    """Cuts a shape into boxes of consecutive elements, in row-major order.

    Args:
        shape: The shape; one without elements has no boxes.
        itemsize: The bytes of an element.
        limit_bytes: The most bytes of a box; one that is less than an element allows
            one element.

    >>> list(iter_boxes((3, 4), itemsize=1, limit_bytes=8))
    [((0, 2), (0, 4)), ((2, 3), (0, 4))]
    >>> list(iter_boxes((2, 4), itemsize=1, limit_bytes=3))[:2]
    [((0, 1), (0, 3)), ((0, 1), (3, 4))]
    """
    if 0 in shape:
        return
    dim, inner_bytes = len(shape), itemsize
    while dim and inner_bytes * shape[dim - 1] <= limit_bytes:
        dim -= 1
        inner_bytes *= shape[dim]
    inner = whole_box(shape[dim:])
    if not dim:
        yield inner
        return
    size, step = shape[dim - 1], max(1, limit_bytes // inner_bytes)
    for outer in np.ndindex(*shape[: dim - 1]):
        head = tuple((index, index + 1) for index in outer)
        for start in range(0, size, step):
            yield (*head, (start, min(start + step, size)), *inner)


def as_dtype(dtype: str | np.dtype) -> np.dtype:
    """Finds a dtype by its name.

    Raises:
        ConfigError: If neither numpy nor `ml_dtypes` has it.

    >>> as_dtype("bfloat16")
    dtype(bfloat16)
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    try:
        found = np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        found = None
    is_number = found is not None and found.kind in "biufcV" and found.itemsize
    if found is None or not is_number or found.fields or found.name != name:
        raise ConfigError(
            f"expected the name of a dtype, such as 'float32', 'bfloat16', 'int4' or "
            f"'float8_e4m3fn', found {name!r}"
        )
    return found


def is_floating(dtype: np.dtype) -> bool:
    """Whether elements are real floats, of whatever width.

    >>> is_floating(as_dtype("float8_e4m3fn")), is_floating(as_dtype("int4"))
    (True, False)
    """
    # numpy's own test says no to most of the dtypes of ml_dtypes.
    return dtype.name.startswith(("float", "bfloat"))


def as_bits(array: np.ndarray) -> np.ndarray:
    """Views elements as unsigned integers, wide ones as several along a last dim.

    >>> as_bits(np.float32([0.0, -0.0])).tolist()
    [[0], [2147483648]]
    """
    array = np.asarray(array, order="C")
    unit = min(array.dtype.itemsize, 8)
    words = (*array.shape, array.dtype.itemsize // unit)
    return array.reshape(-1).view(f"u{unit}").reshape(words)
