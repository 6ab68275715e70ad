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
from jax.dtypes import canonicalize_dtype
from jax.sharding import Mesh

from shardkit.checkpoint.views import Box, View, box_shape, iter_boxes
from shardkit.errors import RestoreError
from shardkit.keys import is_key_dtype
from shardkit.layout import SHARD_AXIS, LeafLayout

__all__ = ["LIMIT_BYTES", "Target", "place", "read_ahead"]

LIMIT_BYTES = 256 << 20
_NUM_THREADS = 8
_TOGETHER_BYTES = 1 << 20
"""Pieces that are no more together are read at once: a read costs more than they do."""

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
    narrowed = [
        f"{x.path} ({x.dtype})"
        for x in targets
        if not is_key_dtype(x.dtype) and canonicalize_dtype(x.dtype) != x.dtype
    ]
    if narrowed:
        raise RestoreError(
            f"{', '.join(narrowed[:20])}: JAX would cut off bits; set jax_enable_x64, "
            "or ask for numpy's arrays"
        )
    plans = [_Leaf(x, views[x.path], limit_bytes // 8) for x in targets]
    jobs = (job for plan in plans for job in plan.jobs())
    results = read_ahead(jobs, limit_bytes // 4)
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
            self._pieces.setdefault(self._box(index), []).append(device)
        self._piece_shape = self._sharding.shard_shape(self._shape)

    def _box(self, index: Sequence[slice] | None) -> Box:
        # A view's own shape ends where padding begins.
        return tuple(
            (min(i.start or 0, size), min(size if i.stop is None else i.stop, size))
            for i, size in zip(index or (), self._view.shape, strict=True)
        )

    def jobs(self) -> Iterator[Job]:
        """Yields what `make` will ask for, in its order."""
        for box in self._reads():
            yield self._num_bytes(box), self._view, box

    def make(self, results: Iterator[np.ndarray]) -> Array:
        """Takes what was read, and makes the array."""
        if self._is_large:
            array = self._from_parts(results)
        else:
            read = {box: next(results) for box in self._reads()}
            pieces = {box: self._piece(box, read) for box in self._pieces}
            array = jax.make_array_from_callback(
                self._shape, self._sharding, lambda index: pieces[self._box(index)]
            )
            if _is_lent(array, pieces.values()):
                array = jax.device_put(array, self._sharding, may_alias=False)
                # What was read is held until it is copied.
                jax.block_until_ready(array)
        # Keys differ in name alone.
        return jax.random.wrap_key_data(array) if self._is_key else array

    @property
    def _is_large(self) -> bool:
        piece_bytes = math.prod(self._piece_shape) * self._view.dtype.itemsize
        return piece_bytes > self._chunk_bytes

    def _num_bytes(self, box: Box) -> int:
        return math.prod(box_shape(box)) * self._view.dtype.itemsize

    def _reads(self) -> Iterator[Box]:
        """What is read at once: pieces, parts of large ones, or many small ones."""
        if self._is_large:
            for box in self._pieces:
                yield from self._parts(box)
            return
        around = tuple(
            (min(start for start, _ in ends), max(stop for _, stop in ends))
            for ends in zip(*self._pieces, strict=True)
        )
        if self._num_bytes(around) <= _TOGETHER_BYTES:
            yield around
        else:
            yield from self._pieces

    def _parts(self, box: Box) -> Iterator[Box]:
        shape = tuple(stop - start for start, stop in box)
        for part in iter_boxes(shape, self._view.dtype.itemsize, self._chunk_bytes):
            yield tuple(
                (first + start, first + stop)
                for (first, _), (start, stop) in zip(box, part, strict=True)
            )

    def _piece(self, box: Box, read: Mapping[Box, np.ndarray]) -> np.ndarray:
        """Takes one piece from what was read, and adds its padding."""
        around = box if box in read else next(iter(read))
        starts = [start for start, _ in around]
        data = read[around][
            tuple(slice(a - s, b - s) for (a, b), s in zip(box, starts, strict=True))
        ]
        if data.shape == self._piece_shape:
            return data
        whole = np.zeros(self._piece_shape, data.dtype)
        whole[tuple(slice(0, size) for size in data.shape)] = data
        return whole

    def _from_parts(self, results: Iterator[np.ndarray]) -> Array:
        """Writes what is read into arrays that are there already."""
        made = {}
        for box, devices in self._pieces.items():
            pieces = [
                jnp.zeros(self._piece_shape, self._view.dtype, device=device)
                for device in devices
            ]
            for part in self._parts(box):
                data = next(results)
                start = [
                    a - first for (a, _), (first, _) in zip(part, box, strict=True)
                ]
                pieces = [_written(piece, data, start) for piece in pieces]
                # What was read is held until it is written.
                jax.block_until_ready(pieces)
            made |= dict(zip(devices, pieces, strict=True))
        order = self._sharding.addressable_devices_indices_map(self._shape)
        return jax.make_array_from_single_device_arrays(
            self._shape, self._sharding, [made[device] for device in order]
        )


def _is_lent(array: Array, pieces: Iterable[np.ndarray]) -> bool:
    """Whether it may share numpy's memory, which no program can use up."""
    if next(iter(array.sharding.device_set)).platform != "cpu":
        return False
    if array.nbytes <= _TOGETHER_BYTES:
        # To copy it costs no more than to find out.
        return True
    spans = [(x.ctypes.data, x.ctypes.data + x.nbytes) for x in pieces]
    starts = [x.data.unsafe_buffer_pointer() for x in array.addressable_shards]
    return any(a <= start < b for a, b in spans for start in starts)


@functools.partial(jax.jit, donate_argnums=0)
def _written(whole: Array, part: Array, start: Sequence[Any]) -> Array:
    return lax.dynamic_update_slice(whole, part, start)
