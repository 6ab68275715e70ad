"""Checkpoints as what changed since another one.

Owns the difference of two trees and its inverse: the bits of both, combined by
exclusive or, so that nothing is lost and whatever did not change is zero. Made to be
written with `compress="planes"`; what it is worth depends on what changed.
"""

from collections.abc import Mapping

import numpy as np

from shardkit.checkpoint.views import Box, View
from shardkit.errors import RestoreError

__all__ = ["delta", "undelta"]


def delta(new: Mapping[str, View], base: Mapping[str, View]) -> dict[str, View]:
    """Returns the bits in which a tree differs from an earlier one.

    Args:
        new: Path → view.
        base: The earlier one, with the same paths, shapes and dtypes.

    Returns:
        Path → view of unsigned integers, one a byte, a last dim of them.

    Raises:
        RestoreError: Naming all leaves that do not agree.

    Example:
        >>> from shardkit.checkpoint.views import ArrayView
        >>> old = {"w": ArrayView(np.array([1.0, 2.0], np.float32))}
        >>> new = {"w": ArrayView(np.array([1.0, 2.5], np.float32))}
        >>> delta(new, old)["w"].read(((0, 2), (0, 4))).tolist()
        [[0, 0, 0, 0], [0, 0, 32, 0]]
        >>> undelta(delta(new, old), old)["w"].read(((0, 2),)).tolist()
        [1.0, 2.5]
    """
    _compare({path: _as_bytes(view) for path, view in new.items()}, base)
    return {path: _Delta(view, base[path]) for path, view in new.items()}


def undelta(change: Mapping[str, View], base: Mapping[str, View]) -> dict[str, View]:
    """Returns the tree of which `delta` told the difference to `base`."""
    _compare({path: (x.shape, x.dtype) for path, x in change.items()}, base)
    return {path: _Undelta(view, base[path]) for path, view in change.items()}


class _Delta(View):
    """The bytes in which two views differ."""

    def __init__(self, new: View, base: View) -> None:
        self._new, self._base = new, base
        self.shape, self.dtype = _as_bytes(new)

    def read(self, box: Box) -> np.ndarray:
        """Reads one box: see `View.read`."""
        *inner, (start, stop) = box
        new, base = (_bytes(x.read(tuple(inner))) for x in (self._new, self._base))
        return np.ascontiguousarray((new ^ base)[..., start:stop])


class _Undelta(View):
    """A view from another and the bytes in which it differs."""

    def __init__(self, change: View, base: View) -> None:
        self._change, self._base = change, base
        self.shape, self.dtype = base.shape, base.dtype

    def read(self, box: Box) -> np.ndarray:
        """Reads one box: see `View.read`."""
        base = self._base.read(box)
        change = self._change.read((*box, (0, self.dtype.itemsize)))
        return (change ^ _bytes(base)).view(self.dtype).reshape(base.shape)


def _bytes(array: np.ndarray) -> np.ndarray:
    size = array.dtype.itemsize
    return (
        np.ascontiguousarray(array)
        .reshape(*array.shape, 1)
        .view(np.uint8)
        .reshape(*array.shape, size)
    )


def _as_bytes(view: View) -> tuple[tuple[int, ...], np.dtype]:
    return (*view.shape, view.dtype.itemsize), np.dtype(np.uint8)


def _compare(
    found: Mapping[str, tuple[tuple[int, ...], np.dtype]], base: Mapping[str, View]
) -> None:
    wanted = {path: _as_bytes(view) for path, view in base.items()}
    bad = [
        path
        for path in sorted({*found, *wanted})
        if found.get(path) != wanted.get(path)
    ]
    if bad:
        raise RestoreError(
            f"a difference needs two trees alike; {len(bad)} paths are not: "
            + ", ".join(bad[:8])
        )
