"""The order of devices in a new mesh.

Owns the choice of who sits where, so that every device finds as much as possible of
what it is to hold already in its memory. Invariant: each host's devices stay together,
and the mesh axes that talk most stay inside a host, unless not even the plain order
does that. It plans no transfers and builds no mesh.

References:
    Crouse, On Implementing 2D Rectangular Assignment Algorithms (IEEE Trans. Aerosp.
    Electron. Syst. 2016).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int
from scipy.optimize import linear_sum_assignment

from shardkit.errors import MeshError
from shardkit.layout import Layout
from shardkit.places import Medium, Places
from shardkit.shares import Shares

__all__ = ["DeviceOrder", "choose_order"]

_MAX_EXACT = 2048
IntArray = Int[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOrder:
    """Who sits where in the new mesh.

    Attributes:
        places: The devices as the grid that they make; the order is `places.ids`.
        bytes_moved: What the devices lack in this order.
        plain_bytes_moved: What they lack in the order that was given.
        reason: How the order came about, for people to read.
    """

    places: Places
    bytes_moved: int
    plain_bytes_moved: int
    reason: str


def choose_order(
    source: Mapping[str, Layout],
    target: Mapping[str, Layout],
    *,
    spares: Places | None = None,
    fast_axes: Sequence[str] = ("tensor", "expert", "context"),
) -> DeviceOrder:
    """Chooses the order of devices in which least has to be moved.

    Where hosts have equally many devices and the mesh takes whole hosts, blocks of the
    mesh are assigned to hosts, and positions in a block to the host's devices, so that
    the sum is the best there is. Otherwise devices are assigned one by one, and the
    plain order stays if that would mix the hosts. Beyond 2048 devices the largest
    shares are dealt out first, which can miss the best.

    Args:
        source: Where the leaves are.
        target: Where they are wanted, all on one grid of devices in the plain order.
        spares: More devices, for which the mesh has no room.
        fast_axes: Axes of the new mesh that are to stay inside a host; the last ones.

    Raises:
        MeshError: If the targets are not on one grid, or a leaf has no source.

    Example:
        >>> old = Layout(Places(("fsdp",), [0, 1, 2, 3], 0), (12,), 4, (("fsdp",),))
        >>> new = Layout(Places(("fsdp",), [3, 1], 0), (12,), 4, (("fsdp",),))
        >>> order = choose_order({"w": old}, {"w": new})
        >>> order.places.ids.tolist(), order.bytes_moved, order.plain_bytes_moved
        ([1, 3], 24, 48)
    """
    grids = {layout.places for layout in target.values()}
    absent = [path for path in target if path not in source]
    if len(grids) != 1 or absent:
        raise MeshError(
            "choose_order: the targets are to be on one grid, and each is to have a "
            f"source; found {len(grids)} grids and {len(absent)} leaves without "
            f"{absent[:5]}. Order the devices of each mesh by itself."
        )
    [grid] = grids
    more = spares or Places.listed([], [], Medium.DEVICE)
    ids = np.concatenate([grid.ids.ravel(), more.ids.ravel()])
    hosts = np.concatenate([grid.hosts.ravel(), more.hosts.ravel()])
    shares = Shares(source, target, Places(("device",), ids, hosts))
    fast = math.prod(grid.axis_sizes.get(axis, 1) for axis in fast_axes)
    plain = np.arange(grid.ids.size)
    order, reason = _order(shares, hosts, len(plain), fast)
    kept, plain_kept = shares.kept(order), shares.kept(plain)
    if kept <= plain_kept and not np.array_equal(order, plain):
        order, kept, reason = plain, plain_kept, "plain order: no other keeps more"
    shape = grid.ids.shape
    return DeviceOrder(
        places=Places(
            grid.axes, ids[order].reshape(shape), hosts[order].reshape(shape)
        ),
        bytes_moved=shares.wanted - kept,
        plain_bytes_moved=shares.wanted - plain_kept,
        reason=reason,
    )


def _order(
    shares: Shares, hosts: IntArray, num: int, fast: int
) -> tuple[Int[np.ndarray, " positions"], str]:
    """Assigns devices, numbered as in `hosts`, to `num` positions."""
    is_exact = len(hosts) <= _MAX_EXACT
    how = "" if is_exact else f", largest shares first for {len(hosts)} devices"
    names, counts = np.unique(hosts, return_counts=True)
    block = int(counts[0])
    fits = block % fast == 0 or fast % block == 0
    if (counts == block).all() and num % block == 0 and fits:
        devices = np.stack([np.flatnonzero(hosts == name) for name in names])
        solve = _best_blocks if is_exact else _greedy_blocks
        return solve(shares, devices, num), (
            f"{num // block} blocks of {block} assigned to hosts, devices within" + how
        )
    if is_exact:
        order = _best(shares.dense())
    else:
        order = _greedy(*shares.entries(), len(hosts), num)
    if _keeps_together(hosts[order], fast):
        return order, "devices assigned one by one, hosts being uneven" + how
    return np.arange(num), (
        "plain order: hosts are uneven, and an assignment would mix them"
    )


def _keeps_together(hosts: IntArray, fast: int) -> bool:
    """Whether each host is one run of positions, and fast groups are inside hosts."""
    num_runs = 1 + np.count_nonzero(np.diff(hosts))
    groups = hosts.reshape(-1, fast)
    inside = bool((groups == groups[:, :1]).all())
    return inside and num_runs == len(np.unique(hosts))


def _best(shares: Int[np.ndarray, "devices positions"]) -> IntArray:
    """The device of each position such that the sum is the largest."""
    device, at = linear_sum_assignment(shares, maximize=True)
    return device[np.argsort(at)]


def _best_blocks(
    shares: Shares, devices: Int[np.ndarray, "hosts block"], num: int
) -> IntArray:
    (num_hosts, block), dense = devices.shape, shares.dense()
    parts = dense[devices.ravel()].reshape(num_hosts, block, num // block, block)
    parts = parts.transpose(0, 2, 1, 3)
    value = np.zeros(parts.shape[:2], np.int64)
    for host, at in np.argwhere(parts.any(axis=(2, 3))):
        part = parts[host, at]
        value[host, at] = part[_best(part), np.arange(block)].sum()
    return np.concatenate(
        [devices[host][_best(parts[host, at])] for at, host in enumerate(_best(value))]
    )


def _greedy(
    device: IntArray, at: IntArray, share: IntArray, num_devices: int, num: int
) -> IntArray:
    """Gives the largest share that is still possible until none is, then fills up."""
    order, free = np.full(num, -1), np.ones(num_devices, bool)
    ranked = np.lexsort((at, device, -share))
    for d, p in zip(device[ranked].tolist(), at[ranked].tolist(), strict=True):
        if order[p] < 0 and free[d]:
            order[p], free[d] = d, False
    empty = np.flatnonzero(order < 0)
    order[empty] = np.flatnonzero(free)[: len(empty)]
    return order


def _greedy_blocks(
    shares: Shares, devices: Int[np.ndarray, "hosts block"], num: int
) -> IntArray:
    num_hosts, block = devices.shape
    device, at, share = shares.entries()
    rank = np.empty(devices.size, np.int64)
    rank[devices.ravel()] = np.arange(devices.size)
    host, number = np.divmod(rank[device], block)
    key, where = np.unique(host * num + at // block, return_inverse=True)
    total = np.zeros(len(key), np.int64)
    np.add.at(total, where, share)
    host_of = _greedy(key // num, key % num, total, num_hosts, num // block)
    order = np.empty(num, np.int64)
    mine = host_of[at // block] == host
    number, at, share = number[mine], at[mine], share[mine]
    # Sorted by block once, so that no block looks at the entries of all.
    ranked = np.argsort(at // block, kind="stable")
    ends = np.searchsorted(at[ranked] // block, np.arange(num // block + 1))
    for i, chosen in enumerate(host_of):
        some = ranked[ends[i] : ends[i + 1]]
        best = _greedy(number[some], at[some] - i * block, share[some], block, block)
        order[i * block : (i + 1) * block] = devices[chosen][best]
    return order
