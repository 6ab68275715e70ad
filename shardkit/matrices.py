"""Work on whole arrays, shared out among devices.

Owns who computes what: a large task is done by one shard, which is sent the pieces of
its arguments, makes them whole, and sends the pieces of its results back. Shards
therefore compute different matrices at the same time, and hold only those whole. What
is small is done by all, which costs less than to wait for one. Invariant: a task sees
the same whole arrays and is the same program on any number of shards; what is sent is
copied and never added. It must run inside `shard_map` (or on one shard).

References:
    Liu et al., Muon is Scalable for LLM Training (2025), for sharing out matrices.
"""

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from shardkit.collectives import gather_pieces
from shardkit.local_rules import Shard
from shardkit.shards import Shards

__all__ = ["WORTH_SENDING", "Task", "assign", "compute"]

WORTH_SENDING = 1 << 20
"""Operations from which on work is left to one shard, where the others would wait."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A function of whole arrays.

    Attributes:
        fn: Takes and returns lists of whole arrays; uses no collective.
        args: Its arguments, whole or in pieces.
        results: The whole results, abstractly.
        dims: The dim along which each result is wanted cut, or None for whole.
        cost: About how many operations it takes.
    """

    fn: Callable[[list[Array]], list[Array]]
    args: list[Shard]
    results: list[jax.ShapeDtypeStruct]
    dims: list[int | None]
    cost: float


def compute(tasks: Sequence[Task], shards: Shards) -> list[list[Shard]]:
    """Computes tasks: large ones each on one shard, small ones on all.

    Args:
        tasks: Tasks of which none depends on another.
        shards: How their arguments are cut.

    Returns:
        The results of each task, cut as it wants them.
    """
    deals = shards.count > 1 and not shards.grouped
    large = [deals and task.cost >= WORTH_SENDING for task in tasks]
    here = [task for task, is_large in zip(tasks, large, strict=True) if not is_large]
    sent = [task for task, is_large in zip(tasks, large, strict=True) if is_large]
    found = {
        False: iter(_compute_here(here, shards) if here else []),
        True: iter(_share_out(sent, shards) if sent else []),
    }
    return [next(found[is_large]) for is_large in large]


def _compute_here(tasks: Sequence[Task], shards: Shards) -> list[list[Shard]]:
    """Computes tasks on every shard."""
    cut = [arg for task in tasks for arg in task.args if arg.dim is not None]
    wholes = _gathered(cut, shards)
    found = []
    for task in tasks:
        args = [arg.array if arg.dim is None else next(wholes) for arg in task.args]
        outs = zip(task.fn(args), task.dims, strict=True)
        found.append(
            [
                Shard(x)
                if dim is None
                else Shard(shards.cut(x, dim), dim, x.shape[dim])
                for x, dim in outs
            ]
        )
    return found


def _share_out(tasks: Sequence[Task], shards: Shards) -> list[list[Shard]]:
    """Computes each task on one shard, and sends the results to all."""
    owners = assign([task.cost for task in tasks], shards.count)
    owned = list(zip(tasks, owners, strict=True))
    cut = [(owner, x) for task, owner in owned for x in task.args if x.dim is not None]
    there = _Packing([(i, x.array.shape, x.array.dtype) for i, x in cut], shards.count)
    sent = [
        [_sent_along(*x) for x in zip(task.results, task.dims, strict=True)]
        for task in tasks
    ]
    back = _Packing(
        [
            (owner, _piece_shape(result, dim, shards), result.dtype)
            for (task, owner), dims in zip(owned, sent, strict=True)
            for result, dim in zip(task.results, dims, strict=True)
        ],
        shards.count,
    )

    def branch(me: int | None) -> Callable[[list[Array]], list[Array]]:
        def work(received: list[Array]) -> list[Array]:
            pieces = iter(there.columns(received, me))
            done: list[Array] = []
            for (task, owner), dims in zip(owned, sent, strict=True):
                if owner == me:
                    whole = [_joined(x, pieces, shards) for x in task.args]
                    outs = zip(task.fn(whole), dims, strict=True)
                    done += [_for_each(x, dim, shards) for x, dim in outs]
            return back.pack_columns(done, me)

        return work

    busy = sorted(set(owners))
    # All that have nothing to do share a branch.
    branches = [branch(owner) for owner in busy] + [branch(None)]
    which = [busy.index(i) if i in busy else len(busy) for i in range(shards.count)]
    assert shards.axis is not None
    index = jnp.asarray(which, jnp.int32)[lax.axis_index(shards.axis)]
    received = _exchange(there.pack_rows([x.array for _, x in cut]), shards)
    done = lax.switch(index, branches, received)
    pieces = iter(back.rows(_exchange(done, shards)))
    found = [
        [
            Shard(next(pieces), dim, 0 if dim is None else result.shape[dim])
            for result, dim in zip(task.results, dims, strict=True)
        ]
        for task, dims in zip(tasks, sent, strict=True)
    ]
    return _as_wanted(found, [task.dims for task in tasks], shards)


def _sent_along(x: jax.ShapeDtypeStruct, dim: int | None) -> int | None:
    """Returns the dim along which a result is sent; None for a scalar."""
    if dim is not None or not x.shape:
        return dim
    # Sent to all, it would be held as often as there are shards; pieces of it are
    # joined there.
    return x.shape.index(max(x.shape))


def _as_wanted(
    found: list[list[Shard]], wanted: Sequence[list[int | None]], shards: Shards
) -> list[list[Shard]]:
    """Joins the results that were sent in pieces and are wanted whole."""
    paired = [
        [(x, dim is None and x.dim is not None) for x, dim in zip(*row, strict=True)]
        for row in zip(found, wanted, strict=True)
    ]
    wholes = _gathered([x for row in paired for x, joined in row if joined], shards)
    return [
        [Shard(next(wholes)) if joined else x for x, joined in row] for row in paired
    ]


def _gathered(cut: Sequence[Shard], shards: Shards) -> Iterator[Array]:
    """Makes pieces whole on every shard."""
    return iter(
        gather_pieces(
            [x.array for x in cut],
            [x.dim for x in cut],  # pyright: ignore[reportArgumentType]
            [x.size for x in cut],
            shards,
        )
    )


def assign(costs: Sequence[float], count: int) -> list[int]:
    """Gives each task to a shard, so that the busiest has as little as can be found.

    Args:
        costs: What each task takes.
        count: The number of shards.

    Returns:
        The shard of each task.

    References:
        Graham, Bounds on Multiprocessing Timing Anomalies (SIAM J. Appl. Math. 1969):
        the longest first, each to whoever has least; at most 4/3 of the optimum.

    Example:
        >>> assign([1.0, 5.0, 3.0, 3.0], 2)
        [0, 0, 1, 1]
    """
    loads = [(0.0, shard) for shard in range(count)]
    owners = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, owners[task] = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[task], owners[task]))
    return owners


def _joined(arg: Shard, pieces: Iterator[Array], shards: Shards) -> Array:
    """Makes an argument whole, whose pieces come next if it was cut."""
    if arg.dim is None:
        return arg.array
    return shards.join(next(pieces), arg.dim, arg.size)


def _piece_shape(
    x: jax.ShapeDtypeStruct, dim: int | None, shards: Shards
) -> tuple[int, ...]:
    if dim is None:
        return x.shape
    return (*x.shape[:dim], shards.piece(x.shape[dim]), *x.shape[dim + 1 :])


def _for_each(x: Array, dim: int | None, shards: Shards) -> Array:
    """Lists what every shard is to have of a whole result, in a new first dim."""
    if dim is not None:
        return shards.split(x, dim)
    return jnp.broadcast_to(x, (shards.count, *x.shape))


def _exchange(buffers: list[Array], shards: Shards) -> list[Array]:
    """Sends row i of every buffer to shard i; rows of the result are by sender."""
    assert shards.axis is not None
    return [lax.all_to_all(x, shards.axis, 0, 0, tiled=True) for x in buffers]


class _Packing:
    """Where pieces lie in buffers with a row per shard, one buffer per dtype.

    Args:
        pieces: The owner, shape and dtype of each.
        count: The number of shards.
    """

    def __init__(
        self, pieces: Sequence[tuple[int, tuple[int, ...], Any]], count: int
    ) -> None:
        self._pieces, self._count = pieces, count
        self._dtypes = list(dict.fromkeys(dtype for _, _, dtype in pieces))
        fill: dict[tuple[int, Any], int] = {}
        self._offsets = []
        for owner, shape, dtype in pieces:
            self._offsets.append(fill.get((owner, dtype), 0))
            fill[owner, dtype] = self._offsets[-1] + math.prod(shape)
        self._lengths = {
            dtype: max(fill.get((i, dtype), 0) for i in range(count))
            for dtype in self._dtypes
        }

    def pack_rows(self, arrays: Sequence[Array]) -> list[Array]:
        """Packs a piece of every array into the row of its owner."""
        buffers = []
        for dtype in self._dtypes:
            rows = [
                self._row([x[None] for x in self._of(arrays, owner, dtype)], 1, dtype)
                for owner in range(self._count)
            ]
            buffers.append(jnp.concatenate(rows))
        return buffers

    def columns(self, buffers: Sequence[Array], owner: int | None) -> list[Array]:
        """Finds the pieces of every array of an owner, as it receives them."""
        return [
            self._column(buffers, i).reshape(self._count, *shape)
            for i, (other, shape, _) in enumerate(self._pieces)
            if other == owner
        ]

    def pack_columns(self, arrays: Sequence[Array], owner: int | None) -> list[Array]:
        """Packs what an owner has for all, whose first dim is the receiver."""
        buffers = []
        mine = [piece for piece in self._pieces if piece[0] == owner]
        for dtype in self._dtypes:
            parts = [
                x
                for x, (_, _, other) in zip(arrays, mine, strict=True)
                if other == dtype
            ]
            buffers.append(self._row(parts, self._count, dtype))
        return buffers

    def rows(self, buffers: Sequence[Array]) -> list[Array]:
        """Finds each piece in the row of the owner that sent it."""
        return [
            self._column(buffers, i)[owner].reshape(shape)
            for i, (owner, shape, _) in enumerate(self._pieces)
        ]

    def _of(self, arrays: Sequence[Array], owner: int, dtype: Any) -> list[Array]:
        return [
            x
            for x, (other, _, kind) in zip(arrays, self._pieces, strict=True)
            if (other, kind) == (owner, dtype)
        ]

    def _row(self, parts: Sequence[Array], rows: int, dtype: Any) -> Array:
        """Joins parts of `rows` rows, padded to the length of a buffer."""
        flat = [part.reshape(rows, -1) for part in parts]
        missing = self._lengths[dtype] - sum(x.shape[1] for x in flat)
        return jnp.concatenate([*flat, jnp.zeros((rows, missing), dtype)], axis=1)

    def _column(self, buffers: Sequence[Array], i: int) -> Array:
        _, shape, dtype = self._pieces[i]
        start = self._offsets[i]
        buffer = buffers[self._dtypes.index(dtype)]
        return lax.slice_in_dim(buffer, start, start + math.prod(shape), axis=1)
