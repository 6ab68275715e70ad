"""Many meshes at once, on hosts.

Owns `Meshes`, the sizes that a search compares, one array per choice, and `Topology`,
the devices they are laid over. Invariant: the axes lie as `MeshSpec.build` lays them,
`data` outermost and `context` innermost. It knows neither models nor costs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shardkit.errors import ConfigError
from shardkit.mesh import MESH_AXES

__all__ = ["Meshes", "Topology"]


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices in hosts.

    Attributes:
        num_devices: All that are there.
        devices_per_host: How many share a host; the last host may have fewer.
        speeds: How fast each device is beside the others; empty if all are alike.

    Raises:
        ConfigError: If a number is not positive, or speeds are not one per device.
    """

    num_devices: int
    devices_per_host: int
    speeds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.num_devices, self.devices_per_host, *self.speeds)
        if not all(number > 0 for number in numbers):
            raise ConfigError(f"planner: expected numbers above 0, found {self}")
        if self.speeds and len(self.speeds) != self.num_devices:
            raise ConfigError(
                f"planner: expected a speed for each of {self.num_devices} devices, "
                f"found {len(self.speeds)}"
            )


@dataclasses.dataclass(frozen=True)
class Meshes:
    """Meshes, and how many microbatches they compute; arrays of one length.

    Attributes:
        sizes: Mesh axis → sizes.
        num_microbatches: Into how many the global batch is cut.
        rounds: How long the last device computes, in microbatches of a device at
            speed 1.
        most: How many microbatches a device computes at most.
        offload: Whether the optimizer's state is in host memory.
    """

    sizes: Mapping[str, np.ndarray]
    num_microbatches: np.ndarray
    rounds: np.ndarray
    most: np.ndarray
    offload: np.ndarray

    @classmethod
    def of(
        cls,
        sizes: Mapping[str, Any],
        num_microbatches: Any,
        rounds: Any = None,
        offload: Any = False,
        most: Any = None,
    ) -> "Meshes":
        """Makes arrays of one length of numbers or arrays; 1 for an axis not named.

        Example:
            >>> meshes = Meshes.of({"data": [1, 2], "tensor": 4}, num_microbatches=7)
            >>> meshes.num_devices, meshes.rounds
            (array([4, 8]), array([7., 4.]))
        """
        unknown = sorted(set(sizes) - set(MESH_AXES))
        if unknown:
            raise ConfigError(
                f"planner: the mesh axes are {', '.join(MESH_AXES)}; found {unknown}"
            )
        columns = [np.asarray(sizes.get(axis, 1)) for axis in MESH_AXES]
        columns += [np.asarray(num_microbatches), np.asarray(offload, bool)]
        *columns, num, away = np.broadcast_arrays(*map(np.atleast_1d, columns))
        named: dict[str, np.ndarray] = dict(zip(MESH_AXES, columns, strict=True))
        if rounds is None:
            rounds = -(-num // (named["data"] * named["fsdp"]))
        rounds = np.broadcast_to(np.asarray(rounds, float), num.shape)
        # Of devices that are alike.
        most = np.ceil(rounds) if most is None else np.asarray(most, float)
        return cls(named, num, rounds, np.broadcast_to(most, num.shape), away)

    def __len__(self) -> int:
        return len(self.num_microbatches)

    @property
    def num_devices(self) -> np.ndarray:
        """How many devices each uses."""
        return np.prod([self.sizes[axis] for axis in MESH_AXES], axis=0)

    @property
    def inner(self) -> np.ndarray:
        """How many devices compute one microbatch together."""
        return np.prod([self.sizes[axis] for axis in MESH_AXES[2:]], axis=0)

    def offloaded(self) -> "Meshes":
        """The same, with the optimizer's state in host memory."""
        return dataclasses.replace(self, offload=np.ones(len(self), bool))

    def take(self, where: Any) -> "Meshes":
        """Some of them."""
        return Meshes(
            {axis: size[where] for axis, size in self.sizes.items()},
            self.num_microbatches[where],
            self.rounds[where],
            self.most[where],
            self.offload[where],
        )

    @classmethod
    def join(cls, parts: Sequence["Meshes"]) -> "Meshes":
        """All of several, one after the other."""
        return cls(
            {a: np.concatenate([x.sizes[a] for x in parts]) for a in MESH_AXES},
            np.concatenate([x.num_microbatches for x in parts]),
            np.concatenate([x.rounds for x in parts]),
            np.concatenate([x.most for x in parts]),
            np.concatenate([x.offload for x in parts]),
        )

    def on_one_host(self, axis: str, topology: Topology) -> np.ndarray:
        """How many devices of a group along an axis share a host, at least."""
        inner = np.ones(len(self), np.int64)
        for name in MESH_AXES[MESH_AXES.index(axis) + 1 :]:
            inner = inner * self.sizes[name]
        size, per_host = self.sizes[axis], topology.devices_per_host
        span = inner * size
        # Groups lie end to end; one that does not fit evenly sits across two hosts.
        fits = (per_host % span == 0) | (self.num_devices <= per_host)
        return np.where(fits, size, np.minimum(np.maximum(per_host // inner, 1), size))
