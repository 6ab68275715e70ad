"""How the leaves of a state lie on a mesh: what is held twice, and what is padding.

Owns the reasons. Invariant: what a device holds is what `shardkit.layout` says,
whatever cuts a leaf. It knows no programs.
"""

import dataclasses
import math
from collections.abc import Sequence

from shardkit.layout import Layout, LeafLayout
from shardkit.logical_axes import AxisRules, mesh_axis
from shardkit.mesh import BATCH_AXES, GROUP_AXES
from shardkit.microbatch import Grid
from shardkit.places import Places
from shardkit.state import find_place

__all__ = ["Idle", "PlacedLeaf", "idle_slots", "place_leaves"]


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedLeaf:
    """One leaf on one mesh.

    Attributes:
        leaf: It, apart from any mesh.
        layout: Which device holds which box of it.
        num_copies: How many devices hold each box.
        reason: Why it is whole, or held several times; `""` if it is neither.
    """

    leaf: LeafLayout
    layout: Layout
    num_copies: int
    reason: str

    @property
    def path(self) -> str:
        """Where it is in the state."""
        return self.leaf.path

    @property
    def num_pieces(self) -> int:
        """Into how many pieces it is cut."""
        return math.prod(self.layout.counts)

    @property
    def padding_bytes(self) -> int:
        """Padding in one copy of it, on all its devices together."""
        return self.layout.piece_bytes * self.num_pieces - self.layout.num_bytes

    @property
    def padded_part(self) -> float:
        """Which part of its memory is padding."""
        total = self.layout.piece_bytes * self.num_pieces
        return self.padding_bytes / total if total else 0.0

    @property
    def extra_bytes(self) -> int:
        """What a device would not hold if every device held another part."""
        return self.layout.piece_bytes - self.layout.piece_bytes // self.num_copies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Idle:
    """How evenly a step's microbatches are dealt.

    Attributes:
        num_microbatches: How many there are.
        counts: How many each group of devices computes.
        num_slots: How many a group has room for.
    """

    num_microbatches: int
    counts: tuple[int, ...]
    num_slots: int

    @property
    def num_waiting(self) -> int:
        """Rounds in which a group has nothing to compute, over all groups."""
        return sum(max(self.counts) - count for count in self.counts)

    @property
    def idle_part(self) -> float:
        """Which part of the groups' time is spent waiting for the longest."""
        return self.num_waiting / (max(self.counts) * len(self.counts))


def place_leaves(
    leaves: Sequence[LeafLayout], places: Places, rules: AxisRules
) -> list[PlacedLeaf]:
    """Says of every leaf how it lies on a mesh, and why.

    Args:
        leaves: Those of a state.
        places: The devices of the mesh.
        rules: Logical axis → mesh axis.

    Example:
        >>> import numpy as np
        >>> places = Places(("data", "fsdp"), [[0, 1], [2, 3]], 0)
        >>> leaf = LeafLayout("params/b", (4,), np.dtype("float32"), -1, ("mlp",))
        >>> [found] = place_leaves([leaf], places, {})
        >>> found.num_copies, found.reason
        (4, "no rule for 'mlp'")
    """
    split = [(leaf.path.partition("/"), leaf.shape) for leaf in leaves]
    params = {(path[2], shape): True for path, shape in split if path[0] == "params"}
    found = []
    for leaf in leaves:
        layout = Layout.of_leaf(leaf, places)
        copies = places.ids.size // math.prod(layout.counts)
        reason = ""
        if copies > 1:
            part, _, place = leaf.path.partition("/")
            # A moment lies like the parameter whose place it has.
            is_known = part != "opt_state" or find_place(place, leaf.shape, params)
            reason = _reason(leaf, layout, rules, bool(is_known))
        found.append(PlacedLeaf(leaf, layout, copies, reason))
    return found


def idle_slots(num_microbatches: int, sizes: dict[str, int]) -> Idle:
    """Says how a step's microbatches are dealt to the groups of a mesh.

    Example:
        >>> idle_slots(8, {"data": 1, "fsdp": 3}).idle_part
        0.1111111111111111
    """
    grid = Grid(num_microbatches, math.prod(sizes[axis] for axis in BATCH_AXES))
    return Idle(
        num_microbatches=num_microbatches,
        counts=tuple(grid.counts.tolist()),
        num_slots=grid.max_count,
    )


def _reason(leaf: LeafLayout, layout: Layout, rules: AxisRules, is_known: bool) -> str:
    """Why devices hold the same: dims that are not cut, axes that cut none."""
    sizes = layout.places.axis_sizes
    cutting = {axis for cut in layout.cuts for axis in cut}
    if any(sizes[axis] > 1 for axis in cutting):
        free = [a for a, n in sizes.items() if n > 1 and a not in cutting]
        by = " and ".join(sorted(a for a in cutting if sizes[a] > 1))
        return f"cut by {by} only, and whole along {' and '.join(free)}"
    if not leaf.shape:
        return "a scalar"
    if leaf.axes is None:
        own = "the optimizer's own: no parameter has its place"
        return "not annotated" if is_known else own
    if cutting:
        return f"{' and '.join(sorted(cutting))} has size 1 on this mesh"
    return ", ".join(dict.fromkeys(_uncut(leaf, sizes, rules))) or "no dim has a name"


def _uncut(leaf: LeafLayout, sizes: dict[str, int], rules: AxisRules) -> list[str]:
    """Why each dim that has a name is not cut."""
    found = []
    for dim, name in enumerate(leaf.axes or ()):
        if name is None:
            continue
        axis = mesh_axis(name, rules)
        if axis is None:
            found.append(f"no rule for {name!r}")
        elif leaf.shape[dim] <= 1:
            found.append(f"dim {dim}, {name!r}, has size {leaf.shape[dim]}")
        elif sizes.get(axis, 1) == 1:
            found.append(f"{name!r} goes to {axis}, of size 1 on this mesh")
        elif axis in GROUP_AXES and leaf.shape[dim] % sizes[axis]:
            why = f"{sizes[axis]} does not divide {leaf.shape[dim]}"
            found.append(f"{name!r} goes to {axis}: {why}")
        else:
            found.append(f"{name!r} goes to {axis}, which cuts no state")
    return found
