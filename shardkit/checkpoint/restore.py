"""Puts what is read onto a mesh.

Owns the way from views to arrays: pieces are read by several threads, a bounded number
of bytes ahead, and each is handed to the devices that want it. Invariants: no host
holds more than its own pieces and `limit_bytes`; what is made is memory that a program
may use up. Whether the bits are right is decided by digests, on the devices.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from shardkit.checkpoint.views import Box, View, iter_boxes
from shardkit.keys import is_key_dtype
from shardkit.layout import SHARD_AXIS, LeafLayout

__all__ = ["LIMIT_BYTES", "Target", "place", "read_ahead"]

LIMIT_BYTES = 256 << 20
_NUM_THREADS = 8

Job = tuple[int, View, Box]
"""How many bytes will be read, and which."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Where one array goes.

    Attributes:
        path: Its path in the tree.
        shape: Its physical shape; what is read may end earlier, and padding is zero.
        dtype: Its dtype; that of keys, if it is to be keys.
        sharding: How it is cut.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    sharding: jax.sharding.Sharding

    @classmethod
    def of_leaf(cls, leaf: LeafLayout, mesh: Mesh) -> "Target":
        """Where a leaf of a training state goes on a mesh."""
        shape = leaf.physical_shape(mesh.shape[SHARD_AXIS])
        return cls(leaf.path, shape, leaf.dtype, leaf.sharding(mesh))


def place(
    views: Mapping[str, View],
    targets: Sequence[Target],
    *,
    limit_bytes: int = LIMIT_BYTES,
) -> Iterator[Array]:
    """Reads arrays onto devices, one after the other.

    Args:
        views: Path → what is to be read; random keys as their words.
        targets: Which, and where to.
        limit_bytes: How much may be held in the host's memory beside the pieces.

    Yields:
        The arrays, in the order of `targets`.

    Raises:
        RestoreError: If something cannot be read.
    """
    plans = [_Leaf(x, views[x.path], limit_bytes // 8) for x in targets]
    jobs = (job for plan in plans for job in plan.jobs())
    results = read_ahead(jobs, limit_bytes // 2)
    try:
        for plan in plans:
            yield plan.make(results)
    finally:
        results.close()


def read_ahead(
    jobs: Iterable[Job], limit_bytes: int
) -> Generator[np.ndarray, None, None]:
    """Reads boxes in several threads, in order, holding no more than a limit.

    A single box above the limit is read alone.
    """
    waiting: collections.deque[Any] = collections.deque()
    held = 0
    pool = concurrent.futures.ThreadPoolExecutor(_NUM_THREADS)
    try:
        for num_bytes, view, box in jobs:
            while waiting and held + num_bytes > limit_bytes:
                done, future = waiting.popleft()
                yield future.result()
                held -= done
            waiting.append((num_bytes, pool.submit(view.read, box)))
            held += num_bytes
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Leaf:
    """What is read for one leaf, and what is made of it."""

    def __init__(self, target: Target, view: View, chunk_bytes: int) -> None:
        self._view, self._is_key = view, is_key_dtype(target.dtype)
        self._chunk_bytes, self._sharding = chunk_bytes, target.sharding
        self._shape = (*target.shape, *view.shape[len(target.shape) :])
        self._pieces: dict[Box, list[Any]] = {}
        for device, index in self._sharding.addressable_devices_indices_map(
            self._shape
        ).items():
            # A view's own shape ends where padding begins.
            box = tuple(
                (min(i.start or 0, size), min(size if i.stop is None else i.stop, size))
                for i, size in zip(index or (), view.shape, strict=True)
            )
            self._pieces.setdefault(box, []).append(device)
        self._piece_shape = self._sharding.shard_shape(self._shape)

    def jobs(self) -> Iterator[Job]:
        """Yields what `make` will ask for, in its order."""
        for box in self._pieces:
            for part in self._parts(box):
                size = math.prod(stop - start for start, stop in part)
                yield size * self._view.dtype.itemsize, self._view, part

    def make(self, results: Iterator[np.ndarray]) -> Array:
        """Takes what was read, and makes the array."""
        made = {}
        for box, devices in self._pieces.items():
            made |= dict(zip(devices, self._piece(box, devices, results), strict=True))
        order = self._sharding.addressable_devices_indices_map(self._shape)
        array = jax.make_array_from_single_device_arrays(
            self._shape, self._sharding, [made[device] for device in order]
        )
        if self._is_lent():
            array = jax.jit(jnp.copy, out_shardings=self._sharding)(array)
        # Keys differ in name alone.
        return jax.random.wrap_key_data(array) if self._is_key else array

    def _is_lent(self) -> bool:
        """Whether arrays are views of numpy's memory, which no program can use up."""
        is_cpu = next(iter(self._sharding.device_set)).platform == "cpu"
        return is_cpu and not self._is_large

    @property
    def _is_large(self) -> bool:
        piece_bytes = math.prod(self._piece_shape) * self._view.dtype.itemsize
        return piece_bytes > self._chunk_bytes

    def _parts(self, box: Box) -> Iterator[Box]:
        if not self._is_large:
            yield box
            return
        shape = tuple(stop - start for start, stop in box)
        for part in iter_boxes(shape, self._view.dtype.itemsize, self._chunk_bytes):
            yield tuple(
                (first + start, first + stop)
                for (first, _), (start, stop) in zip(box, part, strict=True)
            )

    def _piece(
        self, box: Box, devices: Sequence[Any], results: Iterator[np.ndarray]
    ) -> list[Array]:
        if not self._is_large:
            data = next(results)
            if data.shape != self._piece_shape:
                whole = np.zeros(self._piece_shape, data.dtype)
                whole[tuple(slice(0, size) for size in data.shape)] = data
                data = whole
            return [jax.device_put(data, device) for device in devices]
        pieces = [
            jnp.zeros(self._piece_shape, self._view.dtype, device=device)
            for device in devices
        ]
        for part in self._parts(box):
            data = next(results)
            start = [a - first for (a, _), (first, _) in zip(part, box, strict=True)]
            pieces = [_written(piece, data, start) for piece in pieces]
            # What was read is held until it is written.
            jax.block_until_ready(pieces)
        return pieces


@functools.partial(jax.jit, donate_argnums=0)
def _written(whole: Array, part: Array, start: Sequence[Any]) -> Array:
    return lax.dynamic_update_slice(whole, part, start)
