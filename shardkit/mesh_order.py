"""The order of a mesh's devices that suits where a training state is.

Owns `MeshOrder`: for one state, how many bytes a change from one mesh to another moves,
and in which order of the new devices that is the least. Invariant: leaves that are cut
alike count as one, so a state of thousands costs what a few do. Which devices, and
which of the orders that are known, is not decided here.
"""

import collections
from typing import Any

import jax
from jax.sharding import Mesh

from shardkit.device_order import DeviceOrder, choose_order
from shardkit.layout import Layout, LeafLayout
from shardkit.mesh import device_ids
from shardkit.places import Places

__all__ = ["MeshOrder"]


class MeshOrder:
    """Knows what moving a state costs.

    Args:
        layout: A tree of `LeafLayout`.

    Example:
        >>> import numpy as np
        >>> from shardkit.mesh import MeshSpec
        >>> leaf = LeafLayout("w", (8, 3), np.dtype("float32"), 0)
        >>> order = MeshOrder({"w": leaf})
        >>> mesh = MeshSpec().build(jax.devices()[:1])
        >>> order.num_bytes(mesh, mesh), order.devices(mesh, mesh) == jax.devices()[:1]
        (0, True)
    """

    def __init__(self, layout: Any) -> None:
        leaves: list[LeafLayout] = jax.tree.leaves(layout)
        counts = collections.Counter(leaf.kind for leaf in leaves)
        # As many equal leaves hold what one with another, uncut dim in front does.
        self._stacks = [
            LeafLayout(
                str(i),
                (num, *shape),
                dtype,
                dim + 1 if dim >= 0 else dim,
                group=tuple((axis, cut + 1) for axis, cut in group),
            )
            for i, ((shape, dtype, dim, group), num) in enumerate(counts.items())
        ]
        self._known: dict[Any, DeviceOrder] = {}

    def num_bytes(self, old: Mesh, new: Mesh) -> int:
        """The bytes that go from one device to another if `new` is taken as it is."""
        return self._order(old, new).plain_bytes_moved

    def devices(self, old: Mesh, new: Mesh) -> list[Any]:
        """The devices of `new` in the order in which least is moved."""
        by_id = {device.id: device for device in new.devices.flat}
        return [by_id[id] for id in self._order(old, new).places.ids.ravel().tolist()]

    def _order(self, old: Mesh, new: Mesh) -> DeviceOrder:
        key = tuple((device_ids(mesh), mesh.devices.shape) for mesh in (old, new))
        if key not in self._known:
            places = Places.of_mesh(old), Places.of_mesh(new)
            source, target = (
                {leaf.path: Layout.of_leaf(leaf, grid) for leaf in self._stacks}
                for grid in places
            )
            self._known[key] = choose_order(source, target)
        return self._known[key]
