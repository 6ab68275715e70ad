"""From "these devices" to a mesh.

Owns `MeshSpec`: the sizes a user asks for, and what becomes of them on the number
of devices that are alive. The five axes always exist. It never looks for devices
itself, and it decides nothing about tensors.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from shardkit.errors import ConfigError, MeshError

__all__ = [
    "BATCH_AXES",
    "GROUP_AXES",
    "MESH_AXES",
    "MeshSpec",
    "check_no_mesh_is_set",
    "consistency_class",
    "device_ids",
    "exchange_axes",
    "group_size",
    "mesh_sizes",
]

MESH_AXES = ("data", "fsdp", "tensor", "expert", "context")
"""The mesh axes, outermost first."""

BATCH_AXES = ("data", "fsdp")
"""The axes over which the microbatches of a step are dealt out."""

GROUP_AXES = ("tensor", "expert", "context")
"""The axes over which a group of devices computes one microbatch together."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MeshSpec:
    """Axis sizes asked for; at most one is -1 and takes what is left.

    `data` and `fsdp` bend to the devices that are alive: where they do not divide
    them, `fsdp` shrinks to its largest divisor that does, and `data` takes the
    rest. `tensor`, `expert` and `context` never change by themselves, so devices
    that do not fill a whole group of them stay idle.

    Example:
        >>> MeshSpec(data=-1, fsdp=2).sizes(6)["data"]
        3
        >>> MeshSpec(data=-1, fsdp=2).sizes(3)
        {'data': 3, 'fsdp': 1, 'tensor': 1, 'expert': 1, 'context': 1}
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        requested = {axis: getattr(self, axis) for axis in MESH_AXES}
        bad = {a: n for a, n in requested.items() if n != -1 and n < 1}
        if bad:
            raise MeshError(
                f"MeshSpec: axis sizes must be positive, or -1 for one of them; "
                f"found {bad}. Give 1 to an axis that is not used."
            )
        free = [axis for axis, size in requested.items() if size == -1]
        if len(free) > 1:
            raise MeshError(
                f"MeshSpec: only one axis can be -1, found {', '.join(free)}. "
                "Give all but one of them a size."
            )
        if free and free[0] not in BATCH_AXES:
            raise MeshError(
                f"MeshSpec: {free[0]} = -1; only data or fsdp can take what is left, "
                "since a change of any other axis changes the arithmetic."
            )

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Returns the size of every axis on `num_devices` devices.

        Raises:
            MeshError: If the fixed axes alone need more devices than there are.
        """
        fixed = math.prod(getattr(self, axis) for axis in GROUP_AXES)
        if num_devices < fixed:
            raise MeshError(
                f"mesh {self} needs at least {fixed} devices for tensor × expert × "
                f"context, found {num_devices}. Make those axes smaller."
            )
        num_batch = num_devices // fixed
        if self.fsdp == -1:
            data = _largest_divisor(self.data, num_batch)
            fsdp = num_batch // data
        else:
            fsdp = _largest_divisor(self.fsdp, num_batch)
            data = num_batch // fsdp
        return {
            "data": data,
            "fsdp": fsdp,
            **{axis: getattr(self, axis) for axis in GROUP_AXES},
        }

    def decisions(self, num_devices: int) -> list[str]:
        """Says in words where the mesh differs from what was asked for."""
        sizes = self.sizes(num_devices)
        notes = [
            f"{axis} is {sizes[axis]} instead of {getattr(self, axis)} "
            f"on {num_devices} devices"
            for axis in BATCH_AXES
            if getattr(self, axis) not in (-1, sizes[axis])
        ]
        idle = num_devices - int(np.prod(list(sizes.values())))
        if idle:
            notes.append(f"{idle} of {num_devices} devices stay idle")
        return notes

    def build(self, devices: Sequence[Any]) -> Mesh:
        """Lays a mesh over `devices`, in their order.

        Raises:
            MeshError: If there are too few devices.
        """
        sizes = self.sizes(len(devices))
        num_used = int(np.prod(list(sizes.values())))
        grid = np.array(devices[:num_used], dtype=object).reshape(
            tuple(sizes[axis] for axis in MESH_AXES)
        )
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _largest_divisor(limit: int, number: int) -> int:
    """Returns the largest divisor of `limit` that also divides `number`.

    Unlike the largest divisor of `number` up to `limit`, it never exceeds what the
    user asked for and keeps its factors, so that shards stay whole multiples.
    """
    return max(d for d in range(1, limit + 1) if limit % d == 0 and number % d == 0)


def mesh_sizes(mesh: Mesh) -> dict[str, int]:
    """Returns the axes of `mesh` that are larger than 1, for people to read.

    Example:
        >>> import jax
        >>> mesh_sizes(MeshSpec(data=1, fsdp=-1).build(jax.devices()[:1]))
        {'data': 1}
    """
    return {a: n for a, n in mesh.shape.items() if n > 1} or {"data": 1}


def group_size(sizes: Mapping[str, int]) -> int:
    """Returns how many devices compute a microbatch together.

    Args:
        sizes: Mesh axis → size, 1 if left out.
    """
    return math.prod(sizes.get(axis, 1) for axis in GROUP_AXES)


def exchange_axes(mesh: Mesh) -> tuple[str, ...]:
    """Returns the batch axes over which devices exchange what they computed.

    XLA refuses collectives of one device where the axes of a group are the compiler's,
    so that there an axis of size 1 is left out.
    """
    if group_size(mesh.shape) == 1:
        return BATCH_AXES
    return tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)


def device_ids(mesh: Mesh) -> tuple[int, ...]:
    """Returns the ids of the mesh's devices, in mesh order."""
    return tuple(device.id for device in mesh.devices.flat)


def consistency_class(old: Mapping[str, int], new: Mapping[str, int]) -> str:
    """Whether a run that sums exactly keeps its bits from one mesh to another.

    A change of groups changes the arithmetic within a microbatch: what comes out is
    `"equivalent"`, equal but for rounding.

    Args:
        old: Mesh axis → size.
        new: Likewise.

    Example:
        >>> consistency_class({"data": 8}, {"data": 3})
        'exact'
        >>> consistency_class({"tensor": 2}, {"tensor": 4})
        'equivalent'
    """
    same = all(old.get(axis, 1) == new.get(axis, 1) for axis in GROUP_AXES)
    return "exact" if same else "equivalent"


def check_no_mesh_is_set() -> None:
    """Refuses a mesh that JAX has been set, beside which programs have no other one.

    JAX itself refuses only some of them, such as a save's, which may be hours away.

    Raises:
        ConfigError: If there is one.
    """
    current = jax.sharding.get_abstract_mesh()
    if not current.empty:
        raise ConfigError(
            f"Trainer: jax.set_mesh has made {dict(current.shape)} the current mesh. A "
            "trainer makes its own, anew for each set of devices: leave jax.set_mesh "
            "out, or make and run the trainer after its `with`."
        )
