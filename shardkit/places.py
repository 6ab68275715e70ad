"""Grids of places that hold pieces: devices, copies in host memory, files.

Owns `Places`: an id and a host for every point of a grid with named axes. Invariant:
ids are unique within a grid, so an id names one buffer. It knows neither shapes nor
who holds what, and it never touches a device.
"""

import enum
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from shardkit.errors import MeshError

__all__ = ["Medium", "Places"]


class Medium(enum.IntEnum):
    """What a place is made of, the cheapest to read first."""

    DEVICE = 0
    HOST = 1
    DISK = 2


class Places:
    """A grid of places.

    Two grids are equal if their contents are, and a grid can be a key.

    Attributes:
        axes: The names of the grid's axes, outermost first.
        ids: The id of each place: a device's id on devices; in host memory or on disk
            any number, such as the id of the device whose shard it is a copy of.
        hosts: The host of each place; -1 for a disk that is as far from all hosts.
        medium: What the places are made of.

    Raises:
        MeshError: If the parts do not fit, or two places have the same id.

    Example:
        >>> places = Places(("fsdp",), [4, 5, 6, 7], [0, 0, 1, 1])
        >>> places.axis_sizes, places.host(6)
        ({'fsdp': 4}, 1)
    """

    axes: tuple[str, ...]
    ids: Int[np.ndarray, "..."]
    hosts: Int[np.ndarray, "..."]
    medium: Medium

    def __init__(
        self,
        axes: Sequence[str],
        ids: Any,
        hosts: Any,
        medium: Medium = Medium.DEVICE,
    ) -> None:
        self.axes = tuple(axes)
        self.ids = np.array(ids, np.int64)
        self.hosts = np.array(np.broadcast_to(hosts, self.ids.shape), np.int64)
        self.medium = Medium(medium)
        self.ids.flags.writeable = self.hosts.flags.writeable = False
        if len(set(self.axes)) != self.ids.ndim or self.ids.ndim != len(self.axes):
            raise MeshError(
                f"Places: {self.ids.ndim} different axis names are needed for ids of "
                f"shape {self.ids.shape}, found {self.axes}."
            )
        if len(self.slots) != self.ids.size:
            raise MeshError(
                f"Places: every id may occur once, found {self.ids.size} ids of which "
                f"{len(self.slots)} differ. Number the places anew."
            )

    @classmethod
    def of_mesh(
        cls, mesh: Any, host_of: Callable[[Any], int] | None = None
    ) -> "Places":
        """The devices of a mesh.

        Args:
            mesh: A `jax.sharding.Mesh`, or anything with `axis_names` and `devices`.
            host_of: The host of a device; by default the index of its process.
        """
        host_of = host_of or (lambda device: getattr(device, "process_index", 0))
        devices = mesh.devices
        ids = np.fromiter((d.id for d in devices.flat), np.int64, devices.size)
        hosts = np.fromiter((host_of(d) for d in devices.flat), np.int64, devices.size)
        return cls(
            mesh.axis_names, ids.reshape(devices.shape), hosts.reshape(devices.shape)
        )

    @classmethod
    def listed(
        cls,
        ids: Iterable[int],
        hosts: Any = None,
        medium: Medium = Medium.HOST,
        axis: str = "copy",
    ) -> "Places":
        """Places along one axis, such as host copies; host = id unless given."""
        ids = list(ids)
        return cls((axis,), ids, ids if hosts is None else hosts, medium)

    def on(self, medium: Medium, hosts: Any = None) -> "Places":
        """The same grid on another medium: a copy of each piece beside it.

        Args:
            medium: Where the copies are.
            hosts: The host of each copy; by default the host of its original.
        """
        return Places(
            self.axes, self.ids, self.hosts if hosts is None else hosts, medium
        )

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Axis → size."""
        return dict(zip(self.axes, self.ids.shape, strict=True))

    @functools.cached_property
    def slots(self) -> dict[int, int]:
        """Id → position in the flattened grid."""
        return {id: slot for slot, id in enumerate(self.ids.ravel().tolist())}

    def host(self, id: int) -> int:
        """The host of a place."""
        return int(self.hosts.flat[self.slots[id]])

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        data = self.ids.tobytes(), self.hosts.tobytes()
        return self.medium, self.axes, self.ids.shape, *data

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"Places({self.axis_sizes} on {self.medium.name})"
