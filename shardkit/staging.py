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
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from shardkit.bits import as_bits
from shardkit.carry import by_host
from shardkit.keys import raw
from shardkit.places import Places
from shardkit.state_moves import laid_out, raw_leaf

__all__ = ["Staging"]

_SMALL_BYTES = 1 << 20
_MAX_TOGETHER = 64  # how many operands a kernel takes on any backend


@dataclasses.dataclass(frozen=True, slots=True)
class _Spot:
    """Where a leaf's pieces are in their copy, the same on every device."""

    copy: int
    words: slice
    shape: tuple[int, ...]


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
        >>> [words.nbytes for _, words in staging.read(copies, [(0, 0)])]
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
            starts = range(0, len(members), _MAX_TOGETHER)
            copies += [members[at : at + _MAX_TOGETHER] for at in starts]
        for number, members in enumerate(copies):
            shapes = [self.layouts[self.leaves[i].path].piece_shape for i in members]
            ends = list(itertools.accumulate(map(math.prod, shapes)))
            for i, shape, end in zip(members, shapes, ends, strict=True):
                words = slice(end - math.prod(shape), end)
                self._spots[i] = _Spot(number, words, shape)
        return copies

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

    def read(
        self, staged: Sequence[Array], kept: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Takes pieces from copies to host memory, one copy ahead.

        Args:
            staged: What `copy` made.
            kept: The wanted pieces, of devices of this process: leaf, id of the device.

        Yields:
            Which of `kept` it is, and the piece's words without padding, which need
            not be contiguous.
        """
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for index, (leaf, device) in enumerate(kept):
            if leaf in self._spots:
                copy = device, self._spots[leaf].copy
                wanted.setdefault(copy, []).append((index, leaf))
            else:
                shape = [size.stop for size in self._data(leaf, device)]
                yield index, np.empty(shape, _word_dtype(self.leaves[leaf].dtype))
        for (device, copy), words in zip(wanted, _fetched(staged, wanted), strict=True):
            for index, leaf in wanted[device, copy]:
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


def _fetched(
    staged: Sequence[Array], wanted: Iterable[tuple[int, int]]
) -> Iterator[np.ndarray]:
    """Brings copies of devices to host memory, the next while one is looked at."""
    numbers: dict[int, int] = {}
    if staged:
        shards = staged[0].addressable_shards
        numbers = {shard.device.id: i for i, shard in enumerate(shards)}
    before = None
    for device, copy in wanted:
        shard = staged[copy].addressable_data(numbers[device])
        shard.copy_to_host_async()
        if before is not None:
            yield np.asarray(before)
        before = shard
    if before is not None:
        yield np.asarray(before)


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
