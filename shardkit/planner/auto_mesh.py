"""A mesh that the planner chooses: what a user asks for.

Owns `AutoMesh`, and what is found out of the devices that are there: their kind and
their memory. Invariant: all processes of a run find the same. It chooses nothing.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardkit.errors import ConfigError, MeshError
from shardkit.mesh import GROUP_AXES, MeshSpec, check_no_mesh_is_set
from shardkit.planner.profile import (
    HardwareProfile,
    load_profile,
    profile_names,
    profile_of_kind,
)

__all__ = ["AutoMesh", "check_mesh", "find_profile"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoMesh:
    """Lets the planner choose the mesh, at the start and at every change of devices.

    `data` and `fsdp` are always chosen. The sizes of the others enter the bits of a
    run: they are what is said here, or chosen once at the start, and stay at changes,
    so that each of these is exact. `mesh="auto"` is `AutoMesh()`.

    Attributes:
        axes: Which of `tensor`, `expert` and `context` are chosen as well.
        tensor: Its size, if it is not chosen.
        expert: Likewise.
        context: Likewise.
        profile: What the devices can do: one of `shardkit plan --profile`, or the path
            of such a TOML file. None for that of their kind.
        memory_bytes: The memory of a device, of which a step may take nine tenths. None
            for what the devices say that they have, or else the profile.
        allow_equivalent: Whether a change of devices may change the sizes of `axes`.
            From there on the run is equal to rounding only, which is told before.

    Raises:
        ConfigError: Naming all that is wrong.

    Example:
        >>> AutoMesh(axes=("tensor",), context=2).fixed
        {'expert': 1, 'context': 2}
    """

    axes: Sequence[str] = ()
    tensor: int = 1
    expert: int = 1
    context: int = 1
    profile: str | Path | None = None
    memory_bytes: float | None = None
    allow_equivalent: bool = False

    def __post_init__(self) -> None:
        problems = []
        is_list = not isinstance(self.axes, str) and isinstance(self.axes, Sequence)
        if not is_list or not all(axis in GROUP_AXES for axis in self.axes):
            problems.append(
                f"axes: expected some of {', '.join(GROUP_AXES)} (data and fsdp are "
                f"always chosen), found {self.axes!r}"
            )
        for axis in GROUP_AXES:
            size = getattr(self, axis)
            if type(size) is not int or size < 1:
                problems.append(f"{axis}: expected a size of at least 1, found {size}")
            elif size > 1 and is_list and axis in self.axes:
                problems.append(f"{axis}: has the size {size}, and is in axes; choose")
        memory = self.memory_bytes
        is_number = isinstance(memory, int | float) and not isinstance(memory, bool)
        if memory is not None and not (is_number and 0 < memory < math.inf):
            problems.append(f"memory_bytes: expected more than 0, found {memory!r}")
        if self.profile is not None and not isinstance(self.profile, str | Path):
            problems.append(
                f"profile: expected a name or the path of a file, found {self.profile}"
            )
        if self.allow_equivalent and not self.axes:
            problems.append("allow_equivalent: is of no use without axes to change")
        if problems:
            raise ConfigError("AutoMesh: " + "\n  ".join(problems))

    @property
    def fixed(self) -> dict[str, int]:
        """The sizes that are not chosen."""
        return {a: getattr(self, a) for a in GROUP_AXES if a not in self.axes}


def check_mesh(mesh: Any) -> MeshSpec | AutoMesh:
    """Reads the mesh that a trainer is asked for.

    Raises:
        ConfigError: If it is none, or JAX has been set another one.

    Example:
        >>> check_mesh("auto") == AutoMesh()
        True
    """
    check_no_mesh_is_set()
    if isinstance(mesh, MeshSpec | AutoMesh):
        return mesh
    if isinstance(mesh, str | None) and mesh in ("auto", None):
        return AutoMesh() if mesh else MeshSpec()
    raise ConfigError(
        f'Trainer: mesh must be an sk.MeshSpec, "auto" or an sk.AutoMesh, found '
        f"{mesh!r}. Give sizes, such as sk.MeshSpec(data=2, fsdp=-1), of which a mesh "
        "is made on the devices that are there, or let it be chosen."
    )


def find_profile(auto: AutoMesh, pool: Sequence[Any]) -> HardwareProfile:
    """Finds what devices can do, and how much memory they have.

    Over several processes all have to call it: it takes what the least of them have.

    Raises:
        ConfigError: If there is no profile, or nobody knows one of their kind.
        MeshError: If there are no devices.

    Example:
        >>> import jax
        >>> find_profile(AutoMesh(memory_bytes=2e9), jax.devices("cpu")).memory_bytes
        2000000000.0
    """
    if not pool:
        raise MeshError("Trainer: devices: expected at least one, found none")
    profile = load_profile(auto.profile or _name_of(pool))
    memory = auto.memory_bytes or _memory_bytes(pool) or profile.memory_bytes
    return dataclasses.replace(profile, memory_bytes=float(memory))


def _name_of(pool: Sequence[Any]) -> str:
    kind = pool[0].device_kind
    if (name := profile_of_kind(kind)) is not None:
        return name
    raise ConfigError(
        f"Trainer: mesh: there is no profile of {kind!r} to choose a mesh by. Name one "
        f"that is like it, sk.AutoMesh(profile=…) or [mesh] profile, of "
        f"{', '.join(profile_names())}, or the path of a TOML file of yours."
    )


def _memory_bytes(pool: Sequence[Any]) -> float | None:
    """What the device with the least memory has; None where that is not known."""
    here = [d for d in pool if d.process_index == jax.process_index()]
    found = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in here]
    least = min(found, default=0)
    if jax.process_count() > 1 and pool[0].platform != "cpu":
        from jax.experimental import multihost_utils

        everywhere = multihost_utils.process_allgather(np.float32(least))
        least = float(np.min(np.asarray(everywhere)))
    return least or None
