"""A view of another view in another shape.

Owns which source boxes show a box of the reshaped array. Invariant: what one read of a
source brings is at most twice what is used of it, or `SCRATCH_BYTES`.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from shardkit.checkpoint.views import Box, View, box_shape

__all__ = ["SCRATCH_BYTES", "ReshapeView", "match_dims"]

SCRATCH_BYTES = 256 * 1024
"""What is read at once although less is used: seeking would take as long."""


class Group(NamedTuple):
    """Neighbouring dims of either shape that hold the same elements.

    Attributes:
        source: The source's dims.
        target: The target's dims.
    """

    source: range
    target: range


def match_dims(source: Sequence[int], target: Sequence[int]) -> list[Group]:
    """Finds the smallest groups of dims that a reshape keeps apart.

    Args:
        source: A shape with elements.
        target: Another shape with as many.

    >>> [(list(s), list(t)) for s, t in match_dims((4, 6, 5), (4, 2, 3, 5))]
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    groups, i, j = [], 0, 0
    while i < len(source) or j < len(target):
        first, p, q = (i, j), 1, 1
        if i < len(source):
            p, i = source[i], i + 1
        if j < len(target):
            q, j = target[j], j + 1
        while p != q:
            if p < q:
                p, i = p * source[i], i + 1
            else:
                q, j = q * target[j], j + 1
        groups.append(Group(range(first[0], i), range(first[1], j)))
    return groups


class ReshapeView(View):
    """The elements of a view, in row-major order, in another shape."""

    def __init__(
        self,
        source: View,
        shape: Sequence[int],
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> None:
        assert math.prod(shape) == math.prod(source.shape)
        self._source, self._scratch_bytes = source, scratch_bytes
        self.shape, self.dtype = tuple(shape), source.dtype
        self._groups = match_dims(source.shape, shape) if 0 not in self.shape else []
        self._strides = [0] * len(self.shape)
        for group in self._groups:
            stride = 1
            for dim in reversed(group.target):
                self._strides[dim] = stride
                stride *= self.shape[dim]

    def read(self, box: Box) -> np.ndarray:
        """Reads in as few pieces as memory allows: see `View.read`."""
        shape = box_shape(box)
        if 0 in shape:
            return np.empty(shape, self.dtype)
        parts = list(self._split(box))
        if len(parts) == 1:
            return np.asarray(self._piece(box), order="C")
        out = np.empty(shape, self.dtype)
        for part in parts:
            at = tuple(
                slice(a - start, b - start)
                for (a, b), (start, _) in zip(part, box, strict=True)
            )
            out[at] = self._piece(part)
        return out

    def _spans(self, box: Box) -> list[tuple[int, int]]:
        """The run of each group's elements, numbered in order, that holds the box's."""
        spans = []
        for group in self._groups:
            strides = [(self._strides[dim], box[dim]) for dim in group.target]
            start = sum(stride * low for stride, (low, _) in strides)
            last = sum(stride * (high - 1) for stride, (_, high) in strides)
            spans.append((start, last + 1))
        return spans

    def _split(self, box: Box) -> Iterator[Box]:
        """Halves a box until it lies densely enough to be read at once."""
        shape, spans = box_shape(box), self._spans(box)
        num_read = math.prod(stop - start for start, stop in spans)
        allowed = max(2 * math.prod(shape), self._scratch_bytes // self.dtype.itemsize)
        if num_read <= allowed:
            yield box
            return
        for group, (start, stop) in zip(self._groups, spans, strict=True):
            sizes = {dim: shape[dim] for dim in group.target}
            if stop - start > math.prod(sizes.values()):
                dim = next(dim for dim, size in sizes.items() if size > 1)
                low, high = box[dim]
                middle = (low + high) // 2
                for part in ((low, middle), (middle, high)):
                    yield from self._split((*box[:dim], part, *box[dim + 1 :]))
                return

    def _piece(self, box: Box) -> np.ndarray:
        """Reads the runs that hold a box, and shows the box in them."""
        spans = self._spans(box)
        runs = [
            list(_run_boxes(start, stop, [self._source.shape[d] for d in group.source]))
            for group, (start, stop) in zip(self._groups, spans, strict=True)
        ]
        found = self._read_runs(runs, [stop - start for start, stop in spans])
        # The box's corners are the run's ends, so its elements lie evenly in the run.
        steps = [
            self._strides[dim] * found.strides[number]
            for number, group in enumerate(self._groups)
            for dim in group.target
        ]
        return np.lib.stride_tricks.as_strided(
            found, box_shape(box), steps, writeable=False
        )

    def _read_runs(self, runs: list[list[Box]], lengths: list[int]) -> np.ndarray:
        """Reads the product of runs that consist of boxes, one dim for each run."""
        if all(len(boxes) == 1 for boxes in runs):
            (boxes,) = itertools.product(*runs)
            return self._source.read(sum(boxes, ())).reshape(lengths)
        out = np.empty(lengths, self.dtype)
        ends = [list(itertools.accumulate(map(_volume, boxes))) for boxes in runs]
        for numbers in np.ndindex(*map(len, runs)):
            boxes = [part[n] for part, n in zip(runs, numbers, strict=True)]
            sizes = [_volume(box) for box in boxes]
            stops = [end[n] for end, n in zip(ends, numbers, strict=True)]
            at = [slice(b - n, b) for b, n in zip(stops, sizes, strict=True)]
            out[tuple(at)] = self._source.read(sum(boxes, ())).reshape(sizes)
        return out


def _volume(box: Box) -> int:
    return math.prod(box_shape(box))


def _run_boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """Yields the boxes, in order, that hold the elements numbered start to stop."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    row, last = start // inner, (stop - 1) // inner
    if row == last:
        for box in _run_boxes(start - row * inner, stop - row * inner, shape[1:]):
            yield ((row, row + 1), *box)
        return
    first_whole, end_whole = -(-start // inner), stop // inner
    yield from _run_boxes(start, first_whole * inner, shape) if start % inner else ()
    if first_whole < end_whole:
        yield ((first_whole, end_whole), *((0, size) for size in shape[1:]))
    yield from _run_boxes(end_whole * inner, stop, shape) if stop % inner else ()
