"""The next mesh after devices came or went.

Owns what a move costs, and the choice that weighs it against the steps that are left.
Invariant: a move's bytes are never less than what the worst placed device receives. It
moves nothing.

References:
    Wagenländer et al., Tenplex: Dynamic Parallelism for Deep Learning using
    Parallelizable Tensor Collections (SOSP 2024).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from shardkit.errors import ConfigError
from shardkit.mesh import GROUP_AXES, MESH_AXES, consistency_class
from shardkit.planner.choice import Choice, Plan
from shardkit.planner.memory import state_bytes
from shardkit.planner.meshes import Meshes, Topology
from shardkit.planner.model_facts import ModelFacts
from shardkit.planner.profile import HardwareProfile
from shardkit.planner.search import Job, search

__all__ = ["ElasticPlan", "choose_next", "move_s"]


@dataclasses.dataclass(frozen=True)
class ElasticPlan:
    """Where to go on.

    Attributes:
        plan: The mesh, and those it was chosen from.
        move_s: What it takes to get there.
        remaining_s: The move and all steps that are left.
        consistency: `"exact"` if the run keeps its bits, else `"equivalent"`.
    """

    plan: Plan
    move_s: float
    remaining_s: float
    consistency: str

    @property
    def best(self) -> Choice:
        """The mesh to go on with."""
        return self.plan.best


def move_s(
    facts: ModelFacts,
    old: Mapping[str, int],
    meshes: Meshes,
    profile: HardwareProfile,
    topology: Topology,
    *,
    num_lost: int = 0,
) -> Any:
    """Predicts what it takes to go on with other meshes; an array over them.

    Args:
        facts: The model.
        old: Mesh axis → size, of the mesh that is left.
        meshes: Where to go.
        profile: The devices and links.
        topology: The devices there are now.
        num_lost: How many devices of the old mesh are gone.
    """
    kept = state_bytes(facts, meshes)
    piece = sum(kept.values())
    alike = np.ones(len(meshes), bool)
    for axis in ("fsdp", *GROUP_AXES):
        alike &= meshes.sizes[axis] == old.get(axis, 1)
    # Copies that lost no device go on with what they have.
    has_all = alike & (meshes.sizes["data"] <= old.get("data", 1) - num_lost)
    is_same = has_all & (meshes.sizes["data"] == old.get("data", 1))
    spans = topology.num_devices > topology.devices_per_host
    link = profile.links["between" if spans else "inside"]
    received = np.where(has_all, 0.0, piece)
    return np.where(is_same, 0.0, profile.start_s + received / link.bandwidth_bytes_s)


def choose_next(
    job: Job,
    topology: Topology,
    profile: HardwareProfile,
    *,
    old: Mapping[str, int],
    remaining_steps: int,
    num_lost: int = 0,
    memory_limit_bytes: float | None = None,
    min_devices: int = 1,
) -> ElasticPlan:
    """Chooses the mesh with which the run is done soonest.

    It may be the old one, with new devices idle, where a move would not pay any more.
    To keep the bits of a run, let `job` have its number of microbatches only, and fix
    the sizes of `tensor`, `expert` and `context`.

    Args:
        job: What is trained.
        topology: The devices there are now.
        profile: What they can do.
        old: Mesh axis → size, of the mesh that is left.
        remaining_steps: How many steps there still are.
        num_lost: How many devices of the old mesh are gone.
        memory_limit_bytes: As in `search`.
        min_devices: Likewise.

    Raises:
        ConfigError: If no mesh fits, or nothing is left to do.
    """
    unknown = sorted(set(old) - set(MESH_AXES))
    if remaining_steps < 1 or unknown:
        raise ConfigError(
            f"planner: expected at least 1 remaining step and the axes "
            f"{', '.join(MESH_AXES)}; found {remaining_steps} steps and {dict(old)}"
        )

    def extra_s(facts: ModelFacts, meshes: Meshes) -> Any:
        move = move_s(facts, old, meshes, profile, topology, num_lost=num_lost)
        return move / remaining_steps

    plan = search(
        job,
        topology,
        profile,
        memory_limit_bytes=memory_limit_bytes,
        min_devices=min_devices,
        extra_s=extra_s,
    )
    return ElasticPlan(
        plan=plan,
        move_s=plan.best.extra_s * remaining_steps,
        remaining_s=plan.best.total_s * remaining_steps,
        consistency=consistency_class(old, plan.best.sizes),
    )
