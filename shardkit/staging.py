"""Copies of a state on its devices, which the next step cannot touch.

Owns how leaves are laid into a few flat copies per device, and how their pieces are
found there again in host memory. Invariant: what is copied are words, never numbers, so
that no bit is altered; padding is left out where pieces are read. When to copy, and
where pieces go, is decided elsewhere.

A step uses its state up, so a copy must be complete before it: one program makes it,
behind the step before and ahead of the next one, and nobody waits. Each device holds
its pieces twice while a copy is on its way to host memory: `Staging.num_bytes` more.
Several small leaves share one copy, since every array costs the host a call.
"""

import collections
import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec, SingleDeviceSharding

from shardkit.bits import as_bits
from shardkit.carry import by_host
from shardkit.keys import raw
from shardkit.places import Places
from shardkit.state_moves import laid_out, raw_leaf

__all__ = ["Coming", "Staging"]

_SMALL_BYTES = 16 << 20
_TOGETHER_BYTES = 64 << 20
_PINNED = "pinned_host"
_MAX_TOGETHER = 64  # how many operands a kernel takes on any backend


@dataclasses.dataclass(frozen=True, slots=True)
class _Spot:
    """Where a leaf's pieces are in their copy, the same on every device."""

    copy: int
    words: slice
    shape: tuple[int, ...]


@dataclasses.dataclass(slots=True)
class Coming:
    """Pieces on their way to host memory.

    Attributes:
        copies: An array, the id of its device and which copy it is, and what is in it:
            which piece, of which leaf.
        empty: Pieces of no bytes: which, leaf, device.
    """

    copies: collections.deque[
        tuple[Array, tuple[tuple[int, int], list[tuple[int, int]]]]
    ] = dataclasses.field(default_factory=collections.deque)
    empty: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)


class Staging:
    """How a state is copied on the devices of a mesh.

    Args:
        layout: A tree of `LeafLayout`.
        mesh: Where the state is.

    Attributes:
        leaves: The leaves in flattening order; random keys as their words.
        places: The devices.
        layouts: Path → which device has which box.
        spec: How each copy is cut: every device has its own.
        is_on_host: Whether host memory is the memory of the devices.

    Example:
        >>> from shardkit.layout import LeafLayout
        >>> from shardkit.mesh import MeshSpec
        >>> mesh = MeshSpec().build(jax.devices()[:1])
        >>> leaf = LeafLayout("w", (5,), np.dtype("float32"), 0)
        >>> staging = Staging({"w": leaf}, mesh)
        >>> copies = jax.jit(staging.copy)({"w": jnp.arange(5.0)})
        >>> coming = staging.start(copies, [(0, 0)])
        >>> [words.nbytes for _, words in staging.read(coming)]
        [20]
        >>> staging.num_bytes
        20
    """

    def __init__(self, layout: Any, mesh: Mesh) -> None:
        self.leaves = [raw_leaf(leaf) for leaf in jax.tree.leaves(layout)]
        self.places = Places.of_mesh(mesh)
        self.layouts = laid_out(self.leaves, self.places)
        self.spec = PartitionSpec(mesh.axis_names)
        self.is_on_host = by_host(mesh.devices.flat)
        self._spots: dict[int, _Spot] = {}
        self._known: dict[tuple[int, int], tuple[slice, ...]] = {}
        self._copies = self._gather()

    def _gather(self) -> list[list[int]]:
        """Decides which leaves share a copy, and where each of them is in it."""
        copies: list[list[int]] = []
        small: dict[Any, list[int]] = collections.defaultdict(list)
        for i, leaf in enumerate(self.leaves):
            num_bytes = self.layouts[leaf.path].piece_bytes
            if num_bytes >= _SMALL_BYTES:
                copies.append([i])
            elif num_bytes:
                small[_word_dtype(leaf.dtype)].append(i)
        for members in small.values():
            copies += self._share(members)
        for number, members in enumerate(copies):
            shapes = [self.layouts[self.leaves[i].path].piece_shape for i in members]
            ends = list(itertools.accumulate(map(math.prod, shapes)))
            for i, shape, end in zip(members, shapes, ends, strict=True):
                words = slice(end - math.prod(shape), end)
                self._spots[i] = _Spot(number, words, shape)
        return copies

    def _share(self, members: Sequence[int]) -> Iterator[list[int]]:
        """Splits small leaves into those that share a copy."""
        together: list[int] = []
        num_bytes = 0
        for i in members:
            more = self.layouts[self.leaves[i].path].piece_bytes
            is_full = num_bytes + more > _TOGETHER_BYTES
            if together and (is_full or len(together) == _MAX_TOGETHER):
                yield together
                together, num_bytes = [], 0
            together.append(i)
            num_bytes += more
        if together:
            yield together

    @property
    def num_bytes(self) -> int:
        """What a device holds more while a copy is on its way to host memory."""
        return sum(layout.piece_bytes for layout in self.layouts.values())

    def copy(self, state: Any) -> list[Array]:
        """Copies what one device has of a state; to be traced under `shard_map`."""
        leaves = jax.tree.leaves(state)
        # Copied by name, since what only passes through would be the same memory.
        words = {i: jnp.copy(_as_words(leaves[i])).reshape(-1) for i in self._spots}
        return [jnp.concatenate([words[i] for i in copy]) for copy in self._copies]

    def start(self, staged: Sequence[Array], kept: Iterable[tuple[int, int]]) -> Coming:
        """Starts bringing pieces from copies to host memory; nobody waits for them.

        A device brings them beside what is given it to compute later, and behind what
        it was given before: to be called ahead of the next step.

        Args:
            staged: What `copy` made; may be given up once all is read.
            kept: The wanted pieces, of devices of this process: leaf, id of the device.
        """
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
        coming = Coming()
        for index, (leaf, device) in enumerate(kept):
            if leaf in self._spots:
                copy = device, self._spots[leaf].copy
                wanted.setdefault(copy, []).append((index, leaf))
            else:
                coming.empty.append((index, leaf, device))
        numbers: dict[int, int] = {}
        if staged:
            shards = staged[0].addressable_shards
            numbers = {shard.device.id: i for i, shard in enumerate(shards)}
        shards = [staged[i].addressable_data(numbers[id]) for id, i in wanted]
        coming.copies.extend(zip(_to_host(shards), wanted.items(), strict=True))
        return coming

    def read(self, coming: Coming) -> Iterator[tuple[int, np.ndarray]]:
        """Yields pieces as they come to host memory; to be done once.

        Yields:
            Which of `kept` it is, and the piece's words without padding, which need
            not be contiguous.
        """
        for index, leaf, device in coming.empty:
            shape = [size.stop for size in self._data(leaf, device)]
            yield index, np.empty(shape, _word_dtype(self.leaves[leaf].dtype))
        while coming.copies:
            array, ((device, _), pieces) = coming.copies.popleft()
            words = np.asarray(array)
            # What sees its memory keeps it.
            del array
            for index, leaf in pieces:
                spot = self._spots[leaf]
                piece = words[spot.words].reshape(spot.shape)
                yield index, piece[self._data(leaf, device)]

    def _data(self, leaf: int, device: int) -> tuple[slice, ...]:
        """What of a device's piece is no padding; asked for at every snapshot."""
        layout = self.layouts[self.leaves[leaf].path]
        key = id(layout), device
        if key not in self._known:
            box = layout.box(device)
            self._known[key] = tuple(slice(0, stop - start) for start, stop in box)
        return self._known[key]


def _to_host(shards: list[Array]) -> list[Array]:
    """Starts bringing arrays of one device each to where numpy will see them."""
    devices = [device for shard in shards for device in shard.devices()]
    if by_host(devices):
        return shards
    fits = sum(shard.nbytes for shard in shards) < _pinned_bytes()
    if fits and all(_has_pinned(device) for device in set(devices)):
        # Memory that is kept and used again, and that devices write to themselves: new
        # pages and a copy of the copy took ten times as long.
        where = [SingleDeviceSharding(x, memory_kind=_PINNED) for x in devices]
        return jax.device_put(shards, where)
    for shard in shards:
        shard.copy_to_host_async()
    return shards


def _pinned_bytes() -> int:
    """What a snapshot may take of the pinned memory that XLA has for a process."""
    limit = os.environ.get("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "")
    return (int(limit) if limit.isdecimal() else 64) * 10**9 * 3 // 4


def _has_pinned(device: Any) -> bool:
    return any(memory.kind == _PINNED for memory in device.addressable_memories())


def _as_words(x: Array) -> Array:
    """Views numbers as unsigned words, which few programs can alter, if they can be."""
    x = as_bits(raw(x))
    word = _word(x.dtype)
    return x if word == x.dtype else lax.bitcast_convert_type(x, word)


def _word(dtype: Any) -> np.dtype:
    dtype = jnp.dtype(dtype)
    return np.dtype(f"uint{8 * dtype.itemsize}") if dtype.kind in "iuf" else dtype


def _word_dtype(dtype: Any) -> np.dtype:
    """What words a dtype's numbers, or keys, are copied as."""
    if dtype == np.bool_ or np.dtype(dtype).kind == "c":
        return np.dtype(dtype)
    return np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")
