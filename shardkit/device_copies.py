"""Cuts, sends and joins pieces on the devices.

Owns the small programs that do it, each for many leaves of a kind at once, and the
sending from device to device. Invariant: nothing passes through host memory. What is
asked for on abstract arrays is only compiled, so that the programs can be ready before
they are needed.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import SingleDeviceSharding

from shardkit.bits import as_bits, of_bits
from shardkit.kinds import Kind
from shardkit.layout import Box

__all__ = ["copy_on_devices"]

_MAX_LEAVES = 32
_MAX_BYTES = 1 << 30


def copy_on_devices(
    kinds: Sequence[Kind],
    shards: Sequence[dict[int, Array]],
    devices: dict[int, Any],
    *,
    keep_source: bool,
    only_compile: bool = False,
) -> list[list[Array]]:
    """Makes the pieces of some leaves; leaves of a kind follow one another.

    Args:
        kinds: What each leaf is.
        shards: For each leaf: the id of a source's device → shard.
        devices: Id → device.
        keep_source: Whether shards stay usable.
        only_compile: Whether shards are abstract, with their shardings, and so is
            what is returned.

    Returns:
        For each leaf the pieces, in the order of `Kind.parts`.
    """
    doer = _Compiler() if only_compile else _Doer()
    batches, leaves = [], iter(shards)
    for kind, same in itertools.groupby(kinds):
        for size in _sizes(kind, len(list(same))):
            mine = list(itertools.islice(leaves, size))
            batches.append(_Batch(kind, mine, devices, keep_source, doer))
    outbox = [sent for batch in batches for sent in batch.outgoing()]
    arrays, targets = [a for a, _ in outbox], [devices[id] for _, id in outbox]
    inbox = iter(doer.send(arrays, targets))
    return [pieces for batch in batches for pieces in batch.join(inbox)]


def _sizes(kind: Kind, num_leaves: int) -> Iterator[int]:
    """Splits leaves of a kind into powers of two, so that few programs serve."""
    most = min(_MAX_LEAVES, max(1, _MAX_BYTES // max(kind.piece_bytes, 1)))
    while num_leaves:
        size = 1 << (min(most, num_leaves).bit_length() - 1)
        yield size
        num_leaves -= size


class _Batch:
    """Leaves of a kind that share programs."""

    def __init__(
        self,
        kind: Kind,
        shards: Sequence[dict[int, Array]],
        devices: dict[int, Any],
        keep_source: bool,
        doer: "_Doer",
    ) -> None:
        self._do = doer
        self._kind, self._shards, self._devices = kind, shards, devices
        self._keep_source = keep_source
        self._packed = kind.is_small and len(shards) > 1

    def outgoing(self) -> Iterator[tuple[Array, int]]:
        """Cuts, and yields what is to be sent and to which device, part by part."""
        cut = {}
        for source, boxes in self._kind.cuts(self._packed).items():
            made = self._do.call(_cut, self._of(source), boxes, self._packed)
            cut |= {(source, box): x for box, x in zip(boxes, made, strict=True)}
        for id, parts in self._kind.parts.items():
            for part in parts:
                if self._kind.is_cut(part, self._packed):
                    yield from ((x, id) for x in cut[part.source, part.box])
                elif not part.stays:
                    yield from ((x, id) for x in self._of(part.source))

    def join(self, inbox: Iterator[Array]) -> list[list[Array]]:
        """Takes what was sent, in the same order; leaf by leaf the pieces."""
        made = [self._pieces(id, inbox) for id in self._kind.parts]
        return [list(pieces) for pieces in zip(*made, strict=True)]

    def _pieces(self, id: int, inbox: Iterator[Array]) -> Sequence[Array]:
        """One device's pieces, leaf by leaf."""
        kind, num = self._kind, len(self._shards)
        parts = kind.parts[id]
        if kind.is_kept(id, self._keep_source):
            return self._of(id)
        if not parts:
            return self._do.zeros(kind, self._devices[id], num)
        num_sent = 1 if self._packed else num
        given = [
            self._of(id) if part.stays else list(itertools.islice(inbox, num_sent))
            for part in parts
        ]
        if parts[0].is_whole and not parts[0].stays and not self._packed:
            return given[0]
        recipe = tuple(
            (part.box if part.stays else None, part.offset) for part in parts
        )
        return self._do.call(_join, given, recipe, kind.piece_shape, num, kind.dtype)

    def _of(self, id: int) -> list[Array]:
        return [shards[id] for shards in self._shards]


class _Doer:
    """Does what is to be done."""

    def call(self, fn: Any, *args: Any) -> Any:
        return fn(*args)

    def send(self, arrays: Sequence[Array], targets: Sequence[Any]) -> Any:
        return jax.device_put(arrays, targets) if arrays else ()

    def zeros(self, kind: Kind, device: Any, num: int) -> Any:
        # An array each, since a buffer that two leaves share cannot be donated.
        return [
            jnp.zeros(kind.piece_shape, kind.dtype, device=device) for _ in range(num)
        ]


class _Compiler(_Doer):
    """Compiles what is to be done, on abstract arrays; JAX keeps the programs."""

    def call(self, fn: Any, *args: Any) -> Any:
        fn.lower(*args).compile()
        [sharding, *_] = {x.sharding for x in jax.tree.leaves(args) if _is_abstract(x)}
        return jax.tree.map(lambda x: _on(sharding, x), fn.eval_shape(*args))

    def send(self, arrays: Sequence[Array], targets: Sequence[Any]) -> Any:
        return [
            _on(SingleDeviceSharding(device), x)
            for x, device in zip(arrays, targets, strict=True)
        ]

    def zeros(self, kind: Kind, device: Any, num: int) -> Any:
        x = jax.ShapeDtypeStruct(kind.piece_shape, kind.dtype)
        return [_on(SingleDeviceSharding(device), x)] * num


def _is_abstract(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _on(sharding: Any, x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cut(
    shards: Sequence[Array], boxes: Sequence[Box], packed: bool
) -> list[list[Array]]:
    """Cuts boxes; for each of them an array from every shard, or one from all.

    What is cut are the bits, as `_join` takes them.
    """
    bits = [as_bits(shard) for shard in shards]
    cut = [[_slice(x, box) for x in bits] for box in boxes]
    return [[jnp.stack(arrays)] for arrays in cut] if packed else cut


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _join(
    given: Sequence[Sequence[Array]],
    recipe: Sequence[tuple[Box | None, tuple[int, ...]]],
    shape: tuple[int, ...],
    num_leaves: int,
    dtype: Any,
) -> list[Array]:
    """Puts the parts of every leaf together.

    Args:
        given: For each part an array for every leaf, or one for all.
        recipe: For each part the box to cut out first, and where it goes.
        shape: The shape of a piece.
        num_leaves: How many there are.
        dtype: What the pieces are, of which what was cut are only the bits.
    """
    bits = [[as_bits(x) for x in arrays] for arrays in given]

    def part(arrays: Sequence[Array], box: Box | None, number: int) -> Array:
        if box is not None:
            return _slice(arrays[number], box)
        return arrays[number] if len(arrays) == num_leaves else arrays[0][number]

    made = [
        _put_together(
            [part(g, box, i) for g, (box, _) in zip(bits, recipe, strict=True)],
            [offset for _, offset in recipe],
            shape,
        )
        for i in range(num_leaves)
    ]
    return [of_bits(piece, dtype) for piece in made]


def _slice(x: Array, box: Box) -> Array:
    return lax.slice(x, [start for start, _ in box], [stop for _, stop in box])


def _put_together(
    parts: Sequence[Array], offsets: Sequence[tuple[int, ...]], shape: tuple[int, ...]
) -> Array:
    """Puts parts into an array of zeros."""
    dim = _joined_dim(parts, offsets, shape)
    if dim is not None:
        whole = lax.concatenate(parts, dim) if len(parts) > 1 else parts[0].copy()
        pad = [(0, a - b, 0) for a, b in zip(shape, whole.shape, strict=True)]
        return lax.pad(whole, jnp.zeros((), whole.dtype), pad)
    out = jnp.zeros(shape, parts[0].dtype)
    for part, start in zip(parts, offsets, strict=True):
        out = lax.dynamic_update_slice(out, part, start)
    return out


def _joined_dim(
    parts: Sequence[Array], offsets: Sequence[tuple[int, ...]], shape: tuple[int, ...]
) -> int | None:
    """The dim along which the parts, in their order, lie one behind the other."""
    for dim in range(len(shape)):
        rest = [part.shape[:dim] + part.shape[dim + 1 :] for part in parts]
        ends = itertools.accumulate(part.shape[dim] for part in parts)
        starts = [
            (*[0] * dim, at, *[0] * (len(shape) - dim - 1))
            for at in [0, *ends][: len(parts)]
        ]
        if len(set(rest)) == 1 and starts == list(offsets):
            return dim
    return None
