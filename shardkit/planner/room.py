"""Whether there is room for a job, and what to do where there is none.

Owns the mesh that takes least memory, and the refusal that names what would fit: each
suggestion was predicted, but for one that begins with "perhaps".
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from shardkit.errors import ConfigError
from shardkit.mesh import GROUP_AXES
from shardkit.planner.candidates import divisors, inner_sizes, outer_meshes
from shardkit.planner.choice import Choice
from shardkit.planner.cost import predict
from shardkit.planner.meshes import Meshes, Topology
from shardkit.planner.model_facts import ModelFacts
from shardkit.planner.profile import HardwareProfile
from shardkit.planner.quotas import Quotas
from shardkit.planner.search import KEPT_PART, Job
from shardkit.words import format_bytes, format_mesh

__all__ = ["check_room", "predicted", "variants"]

_MOST_DOUBLINGS = 6


def predicted(
    job: Job, topology: Topology, profile: HardwareProfile, sizes: Mapping[str, int]
) -> Choice:
    """Predicts one mesh, with the first of what else may be chosen.

    Args:
        job: What is trained.
        topology: The devices.
        profile: What they can do.
        sizes: Mesh axis → size.
    """
    return next(variants(job, topology, profile, sizes))


def variants(
    job: Job, topology: Topology, profile: HardwareProfile, sizes: Mapping[str, int]
) -> Iterator[Choice]:
    """Predicts one mesh with all that may be chosen beside it; as `predicted` does."""
    inner = math.prod(sizes.get(axis, 1) for axis in GROUP_AXES)
    groups = np.array([math.prod(sizes.values()) // inner])
    # A mesh may be asked about that has more devices than there are.
    has_speeds = topology.speeds and groups[0] * inner <= topology.num_devices
    quotas = Quotas(topology, inner) if has_speeds else None
    for remat, num, facts in job.blocks():
        rounds = most = None
        if quotas is not None:
            rounds = quotas.rounds(num, groups)
            most = quotas.most(num, rounds)
        meshes = job.placed(Meshes.of(sizes, num, rounds, most=most))
        costs = predict(facts, meshes, profile, topology, exact=job.exact)
        for i in range(len(meshes)):
            yield Choice.at(i, remat, meshes, costs, 0.0)


def check_room(
    job: Job,
    topology: Topology,
    profile: HardwareProfile,
    *,
    where: str = "",
    more_memory: str = "{} of memory on each device",
) -> None:
    """Refuses a job that fits on no mesh.

    Args:
        job: What is trained.
        topology: The devices.
        profile: What they can do, with their memory.
        where: What to begin the message with.
        more_memory: How to spell that devices with so much memory would do.

    Raises:
        ConfigError: Naming the mesh that takes least, and what would fit; or groups
            that are larger than all devices.
    """
    num = topology.num_devices
    groups = {axis: job.fixed.get(axis, 1) for axis in GROUP_AXES}
    needed = math.prod(groups.values())
    if needed > num:
        raise ConfigError(
            f"{where}no mesh of {num} devices: {format_mesh(groups)} needs {needed}, "
            "and with other sizes the run would not keep its bits."
        )
    limit = profile.memory_bytes * KEPT_PART
    least = _smallest(job, topology, profile)
    if least.memory_bytes <= limit:
        return
    kind = max(least.memory, key=lambda name: least.memory[name])
    gigabytes = math.ceil(least.memory_bytes / KEPT_PART / 1e8) / 10
    memory = more_memory.format(f"{gigabytes:g}GB")
    advice = [memory, *_what_fits(job, topology, profile)]
    if kind == "activations" and len(job.facts) == 1:
        advice.append("perhaps remat, or smaller microbatches, in the model's options")
    what = f"mesh of {num} devices fits" if num > 1 else "single device has the room"
    raise ConfigError(
        f"{where}no {what}: "
        f"{format_mesh(least.sizes)} takes least, {format_bytes(least.memory_bytes)} "
        f"a device, most of it {kind} with {format_bytes(least.memory[kind])}; that is "
        f"{format_bytes(least.memory_bytes - limit)} more than {format_bytes(limit)}, "
        f"{KEPT_PART:.0%} of its memory. What would fit: {'; '.join(advice)}."
    )


def _smallest(job: Job, topology: Topology, profile: HardwareProfile) -> Choice:
    """Finds the mesh that takes least memory, of those with the fewest devices."""
    found = [_smallest_of(job, topology, profile, *block) for block in job.blocks()]
    choices = [choice for choice in found if choice is not None]
    if not choices:
        raise ConfigError(
            f"no mesh of {topology.num_devices} devices has the sizes that are given: "
            f"{job.fixed}. Give fewer, or other ones."
        )
    return min(choices, key=lambda choice: (choice.memory_bytes, choice.num_devices))


def _smallest_of(
    job: Job,
    topology: Topology,
    profile: HardwareProfile,
    remat: str,
    num: int,
    facts: ModelFacts,
) -> Choice | None:
    dims = [
        size
        for leaf in facts.params
        for axis, size in zip(leaf.cuts, leaf.shape, strict=True)
        if axis == "fsdp"
    ]
    most = max(dims, default=1)
    rows = [*inner_sizes(facts.divisors, topology.num_devices, job.fixed)]
    groups = {math.prod(row.values()) for row in rows}
    quotas = {size: Quotas(topology, size) for size in groups}
    found = [
        outer_meshes(row, quotas[math.prod(row.values())], num, most, job.fixed)
        for row in rows
    ]
    if not sum(map(len, found)):
        return None
    meshes = job.placed(Meshes.join(found))
    costs = predict(facts, meshes, profile, topology, exact=job.exact)
    order = np.lexsort((meshes.num_devices, costs.memory_bytes))
    return Choice.at(int(order[0]), remat, meshes, costs, 0.0)


def _what_fits(job: Job, topology: Topology, profile: HardwareProfile) -> Iterator[str]:
    """Tries what a user could change: each alone, and together if none is enough."""
    limit = profile.memory_bytes * KEPT_PART

    def fits(words: str, devices: Topology, **change: Any) -> str:
        try:
            other = dataclasses.replace(job, **change)
        except ConfigError:
            # Exact sums have no room for so many microbatches.
            return ""
        least = _smallest(other, devices, profile).memory_bytes
        return f"{words} ({format_bytes(least)})" if least <= limit else ""

    finer = [
        num
        for num in divisors(job.global_batch_size)
        if num > max(job.num_microbatches)
    ]
    floats = fits("consistency = fast", topology, exact=False) if job.exact else ""
    cuts = (
        fits(f"num_microbatches = {num}", topology, num_microbatches=[num])
        for num in finer
    )
    found = [floats, next(filter(None, cuts), "")]
    if not (job.offload or job.may_offload or profile.is_shared):
        found.append(fits("offload = true", topology, offload=True))
    if not any(found) and job.exact:
        both = (
            fits(
                f"consistency = fast with num_microbatches = {num}",
                topology,
                exact=False,
                num_microbatches=[num],
            )
            for num in finer
        )
        found.append(next(filter(None, both), ""))
    counts = (topology.num_devices << times for times in range(1, _MOST_DOUBLINGS + 1))
    more = (
        fits(f"{num} devices", Topology(num, topology.devices_per_host))
        for num in counts
    )
    found.append(next(filter(None, more), ""))
    yield from filter(None, found)
