"""Which meshes are worth comparing.

Owns the list of meshes for a number of devices. Invariant: on up to `_ALL` groups of
devices it has every mesh that could be best: all sizes of `fsdp`, with every size of
`data`. On more it has all factorisations of the devices there are, and those that leave
some idle where that could pay. It predicts nothing.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np

from shardkit.mesh import GROUP_AXES
from shardkit.planner.meshes import Meshes
from shardkit.planner.quotas import Quotas

__all__ = ["divisors", "inner_sizes", "outer_meshes"]

_ALL = 64
_NEAR = 4


@functools.cache
def divisors(number: int) -> tuple[int, ...]:
    """All divisors, in order.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return tuple(sorted({*small, *(number // n for n in small)}))


def inner_sizes(
    limits: Mapping[str, int], num_devices: int, fixed: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """Yields all sizes of the axes within a microbatch that divide their limits.

    Args:
        limits: Axis → what its size has to divide.
        num_devices: All that are there.
        fixed: Axis → a size that is given.

    Example:
        >>> [sizes["tensor"] for sizes in inner_sizes({"tensor": 6}, 3, {})]
        [1, 2, 3]
    """
    options = [
        (fixed[axis],) if axis in fixed else divisors(limits.get(axis, 1))
        for axis in GROUP_AXES
    ]
    for sizes in itertools.product(*options):
        if math.prod(sizes) <= num_devices:
            yield dict(zip(GROUP_AXES, sizes, strict=True))


def outer_meshes(
    inner: Mapping[str, int],
    quotas: Quotas,
    num_microbatches: int,
    max_fsdp: int,
    fixed: Mapping[str, int],
) -> Meshes:
    """Lists the sizes of `data` and `fsdp` to compare, for given sizes of the others.

    Args:
        inner: Sizes of the axes within a microbatch.
        quotas: Of groups of so many devices.
        num_microbatches: Into how many the global batch is cut.
        max_fsdp: The largest dim of the state; more pieces hold nothing.
        fixed: Axis → a size that is given.
    """
    data, fsdp = _pairs(quotas, num_microbatches, max_fsdp)
    keep = np.ones(len(data), bool)
    for axis, sizes in (("data", data), ("fsdp", fsdp)):
        if axis in fixed:
            keep &= sizes == fixed[axis]
    data, fsdp = data[keep], fsdp[keep]
    groups, where = np.unique(data * fsdp, return_inverse=True)
    rounds = quotas.rounds(num_microbatches, groups)
    most = quotas.most(num_microbatches, rounds)[where]
    sizes = {"data": data, "fsdp": fsdp, **inner}
    return Meshes.of(sizes, num_microbatches, rounds[where], most=most)


def _pairs(
    quotas: Quotas, num_microbatches: int, max_fsdp: int
) -> tuple[np.ndarray, np.ndarray]:
    most = quotas.num_groups
    found = []
    for fsdp in _fsdp_sizes(most, max_fsdp):
        limit = most // fsdp
        if limit <= _ALL or not quotas.is_even:
            data = np.arange(1, min(limit, _ALL) + 1)
            data = np.unique(np.append(data, [*_steps(limit), limit]))
        else:
            # Of sizes that are equally fast the smallest exchanges least.
            least = -(-num_microbatches // (limit * fsdp))
            rounds = np.unique(
                [*range(least, least + _NEAR), *_steps(num_microbatches)]
            )
            data = -(-num_microbatches // (rounds * fsdp))
            data = np.unique(np.append(data[data <= limit], [1, limit]))
        found.append((data, np.full(len(data), fsdp)))
    columns = zip(*found, strict=True)
    data, fsdp = (np.concatenate(column) for column in columns)
    return data, fsdp


def _fsdp_sizes(most: int, max_fsdp: int) -> list[int]:
    if most <= _ALL:
        return list(range(1, min(most, max_fsdp) + 1))
    sizes = {*divisors(most), *_steps(most)}
    return sorted(size for size in sizes if size <= max_fsdp)


def _steps(most: int) -> list[int]:
    """Powers of two, and half of the way between them."""
    powers = [1 << n for n in range(most.bit_length())]
    return [n for p in powers for n in (p, p + p // 2) if n <= most]
