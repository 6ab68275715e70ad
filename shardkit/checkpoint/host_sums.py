"""Digests of the blocks of what is read box by box into host memory.

Owns the adding up of boxes, which may come in any order. Invariant: the digests are
those that devices compute, whatever JAX is set to, of 64-bit elements too.
"""

import functools
import math
import threading

import jax
import numpy as np

from shardkit.blocks import Blocks
from shardkit.checkpoint.block_sums import BlockTable
from shardkit.checkpoint.views import Box, View, box_shape, iter_boxes
from shardkit.digest import shard_digests
from shardkit.layout import LeafLayout

__all__ = ["HostSums"]


class HostSums:
    """The digests of the blocks of a view, found as its boxes are read.

    Args:
        view: Of which.
    """

    def __init__(self, view: View) -> None:
        shape, dtype = view.shape, view.dtype
        self._blocks = Blocks.of(shape, dtype.itemsize)
        # JAX narrows what is wider than 32 bits, unless it is told not to; a digest is
        # of words of 32 bits, as if these were a last dim.
        self._num_words = dtype.itemsize // 4 if dtype.itemsize > 4 else 0
        if self._num_words:
            shape, dtype = (*shape, self._num_words), np.dtype(np.uint32)
        self._leaf = LeafLayout("", shape, dtype)
        self._view, self._lock = view, threading.Lock()
        self._parts: dict[Box, np.ndarray] = {}

    def add(self, box: Box, data: np.ndarray) -> None:
        """Takes a box; one that is read again counts once."""
        start = [first for first, _ in box]
        if self._num_words:
            words = np.ascontiguousarray(data).reshape(-1).view(np.uint32)
            data, start = words.reshape(*data.shape, self._num_words), [*start, 0]
        sums = _digests(data, np.array(start, np.int32), self._leaf, self._blocks)
        with self._lock:
            self._parts[box] = np.asarray(sums)

    def table(self, limit_bytes: int) -> np.ndarray:
        """Adds up all boxes: `uint32 [blocks, 4]`.

        Args:
            limit_bytes: Where boxes overlapped or some are missing all is read once
                more, in boxes of at most so many bytes.
        """
        view = self._view
        if sum(math.prod(box_shape(box)) for box in self._parts) != math.prod(
            view.shape
        ):
            self._parts.clear()
            for box in iter_boxes(view.shape, view.dtype.itemsize, limit_bytes):
                self.add(box, view.read(box))
        table = BlockTable(self._blocks)
        for box, sums in self._parts.items():
            table.add(sums, [start for start, _ in box[: len(self._blocks.grid)]])
        return table.lanes()


_digests = functools.partial(jax.jit, static_argnums=(2, 3))(shard_digests)
