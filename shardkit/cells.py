"""The common refinement of several ways to cut a leaf.

Owns `Cells`: a leaf, or a window of it, cut wherever one of several layouts cuts it,
so that each cell lies inside one piece of every layout; and the joining of boxes that
were cut too finely. Invariant: cells are disjoint and make up the window. It does not
know who holds a piece.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from shardkit.layout import Box
from shardkit.senders import unravel

__all__ = ["Cells", "merge", "refine"]

IntArray = Int[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """A window of a leaf, cut wherever one of several layouts cuts it.

    Attributes:
        edges: For every dim, where the intervals start, and the end of the last.
        index: Which cells of the grid of intervals are meant, flattened.
        volume: Elements in each.
        pieces: For every layout, the piece in which each cell lies.
    """

    edges: tuple[IntArray, ...]
    index: Int[np.ndarray, " cells"]
    volume: Int[np.ndarray, " cells"]
    pieces: tuple[Int[np.ndarray, " cells"], ...]

    def take(self, keep: Bool[np.ndarray, " cells"]) -> "Cells":
        """Those cells only."""
        return Cells(
            self.edges,
            self.index[keep],
            self.volume[keep],
            tuple(piece[keep] for piece in self.pieces),
        )

    def box(self, cell: int) -> Box:
        """The box of one cell."""
        shape = [len(edges) - 1 for edges in self.edges]
        where = unravel(self.index[cell], tuple(shape))
        return tuple(
            (int(edges[i]), int(edges[i + 1]))
            for edges, i in zip(self.edges, where, strict=True)
        )


def refine(
    sizes: tuple[int, ...], counts: Sequence[tuple[int, ...]], window: Box
) -> Cells:
    """Cuts a window wherever one of several layouts cuts it.

    Args:
        sizes: The sizes of the dims that are cut.
        counts: For every layout, into how many pieces it cuts each of them.
        window: What to cut.

    Example:
        >>> cells = refine((12,), [(3,), (2,)], ((0, 12),))
        >>> [cells.box(i) for i in range(4)]
        [((0, 4),), ((4, 6),), ((6, 8),), ((8, 12),)]
        >>> cells.pieces[0].tolist(), cells.pieces[1].tolist()
        ([0, 1, 1, 2], [0, 0, 1, 1])
    """
    all_edges, volume = [], np.ones(1, np.int64)
    pieces = [np.zeros(1, np.int64)] * len(counts)
    for dim, (low, high) in enumerate(window):
        steps = [-(-sizes[dim] // count[dim]) for count in counts]
        edges = _edges(low, high, {step for step in steps if step < sizes[dim]})
        starts = edges[:-1]
        volume = np.multiply.outer(volume, edges[1:] - starts).ravel()
        for i, step in enumerate(steps):
            index = starts // step if low < high else starts
            pieces[i] = np.add.outer(pieces[i] * counts[i][dim], index).ravel()
        all_edges.append(edges)
    return Cells(tuple(all_edges), np.arange(len(volume)), volume, tuple(pieces))


def _edges(low: int, high: int, steps: set[int]) -> IntArray:
    if low >= high:
        return np.array([low])
    cuts = [np.arange(low - low % step + step, high, step) for step in sorted(steps)]
    edges = np.concatenate([[low], *cuts, [high]])
    if len(steps) > 1:
        # The runs are sorted, so that a merge sort has little to do.
        edges.sort(kind="stable")
        edges = edges[np.flatnonzero(np.diff(edges, prepend=low - 1))]
    return edges


def merge(boxes: Sequence[Box]) -> list[Box]:
    """Joins disjoint boxes that touch along a whole face.

    Example:
        >>> merge([((0, 2), (0, 4)), ((2, 3), (0, 4)), ((5, 6), (0, 4))])
        [((0, 3), (0, 4)), ((5, 6), (0, 4))]
    """
    found, before = sorted(boxes), math.inf
    while len(found) < before:
        before = len(found)
        for dim in range(len(found[0]) if found else 0):
            found = _merge_dim(found, dim)
    return sorted(found)


def _merge_dim(boxes: Sequence[Box], dim: int) -> list[Box]:
    done: list[Box] = []
    for box in sorted(boxes, key=lambda b: (b[:dim], b[dim + 1 :], b[dim])):
        if done:
            last = done[-1]
            others = last[:dim] + last[dim + 1 :] == box[:dim] + box[dim + 1 :]
            if others and last[dim][1] == box[dim][0]:
                joined = (last[dim][0], box[dim][1])
                done[-1] = (*last[:dim], joined, *last[dim + 1 :])
                continue
        done.append(box)
    return done
