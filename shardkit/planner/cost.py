"""How long a step takes on a mesh, before there is one.

Owns the roofline of the computation and the links of the collectives. Invariant: a
mesh's time is a sum of named parts, so that it can be said why one is slower than
another. Figures come from a `HardwareProfile`, work and bytes from `ModelFacts`.

References:
    Williams et al., Roofline: An Insightful Visual Performance Model (CACM 2009).
    Thakur et al., Optimization of Collective Communication Operations in MPICH (2005).
"""

import dataclasses
import math
from typing import Any

import numpy as np

from shardkit.mesh import GROUP_AXES
from shardkit.planner.exchanges import microbatch_exchanges, state_exchanges
from shardkit.planner.memory import BUCKET_BYTES, memory, state_bytes, whole_bytes
from shardkit.planner.meshes import Meshes, Topology
from shardkit.planner.model_facts import ModelFacts
from shardkit.planner.profile import HardwareProfile

__all__ = ["Costs", "microbatch_time_s", "predict"]

# What a step reads and writes per accumulator element of a microbatch: the gradient,
# and each accumulator twice.
_BYTES_TO_ADD = {True: 4 + 4 * 4, False: 4 + 2 * 4}


@dataclasses.dataclass(frozen=True)
class Costs:
    """What meshes cost; every value is an array over them.

    Attributes:
        memory: Kind → bytes on one device.
        time_s: Part → seconds of a step.
        sent_bytes: Axis → what each device sends in a step.
    """

    memory: dict[str, Any]
    time_s: dict[str, Any]
    sent_bytes: dict[str, Any]

    @property
    def memory_bytes(self) -> Any:
        """The peak of one device."""
        return sum(self.memory.values())

    @property
    def step_s(self) -> Any:
        """A whole step."""
        return sum(self.time_s.values())


def predict(
    facts: ModelFacts,
    meshes: Meshes,
    profile: HardwareProfile,
    topology: Topology,
    *,
    exact: bool = True,
) -> Costs:
    """Predicts memory and time of a step.

    Args:
        facts: The model, read with microbatches of the rows that these meshes have.
        meshes: The meshes.
        profile: The devices and links.
        topology: How devices share hosts.
        exact: Whether gradients are summed as integers.
    """
    links = {axis: _link(axis, meshes, profile, topology) for axis in meshes.sizes}
    share = _share(meshes, profile)
    time_s = {
        "compute": meshes.rounds * microbatch_time_s(facts, meshes, profile),
        "adding gradients": meshes.rounds
        * whole_bytes(facts.params, meshes, 4)
        / 4
        * _BYTES_TO_ADD[exact]
        / _memory_speed(profile)
        * share,
        "update": _update_bytes(facts, meshes) / _memory_speed(profile) * share,
        "overhead": profile.step_overhead_s
        + meshes.rounds * profile.microbatch_overhead_s,
    }
    sent: dict[str, Any] = {}
    for axis, (bandwidth, latency) in links.items():
        num_bytes, calls = _sent(axis, facts, meshes, exact)
        n = meshes.sizes[axis]
        sent[axis] = num_bytes
        delay = np.where(n > 1, calls * latency * np.ceil(np.log2(np.maximum(n, 2))), 0)
        time_s[f"over {axis}"] = num_bytes / bandwidth * share + delay
    away = np.where(meshes.offload, 2 * state_bytes(facts, meshes)["optimizer"], 0.0)
    offload = profile.links["offload"]
    time_s["offload"] = away / offload.bandwidth_bytes_s * share
    return Costs(memory(facts, meshes, exact=exact), time_s, sent)


def microbatch_time_s(
    facts: ModelFacts, meshes: Meshes, profile: HardwareProfile
) -> Any:
    """Seconds of the gradient of one microbatch, by the roofline."""
    flop_s = np.zeros(len(meshes))
    for (dtype, axes), amount in facts.work.flops.items():
        count = math.prod(meshes.sizes[axis] for axis in axes)
        flop_s += amount / count / (profile.peak(dtype) * profile.flops_fraction)
    num_bytes = facts.work.share(facts.work.product_bytes, meshes.sizes)
    written = facts.work.share(facts.work.other_bytes, meshes.sizes)
    # What is written is read again.
    num_bytes = num_bytes + 2 * profile.written_fraction * written
    memory_s = num_bytes / _memory_speed(profile)
    return np.maximum(flop_s, memory_s) * _share(meshes, profile)


def _memory_speed(profile: HardwareProfile) -> float:
    return profile.memory_bandwidth_bytes_s * profile.memory_fraction


def _share(meshes: Meshes, profile: HardwareProfile) -> Any:
    """By how much devices that share a host slow one another down."""
    if not profile.is_shared:
        return 1.0
    return np.minimum(meshes.num_devices, profile.devices_per_host)


def _link(
    axis: str, meshes: Meshes, profile: HardwareProfile, topology: Topology
) -> tuple[Any, Any]:
    """Bandwidth and latency of the slowest link on the way around an axis."""
    inside, between = profile.links["inside"], profile.links["between"]
    together = meshes.on_one_host(axis, topology)
    is_inside = together >= meshes.sizes[axis]
    # A group with several devices on a host has several ways out of it.
    out = np.minimum(between.bandwidth_bytes_s * together, inside.bandwidth_bytes_s)
    bandwidth = np.where(is_inside, inside.bandwidth_bytes_s, out)
    return bandwidth, np.where(is_inside, inside.latency_s, between.latency_s)


def _sent(axis: str, facts: ModelFacts, meshes: Meshes, exact: bool) -> tuple[Any, Any]:
    """Bytes that a device sends over an axis in a step, and in how many calls."""
    num_bytes, calls = np.zeros(len(meshes)), np.zeros(len(meshes))
    for exchange in state_exchanges(facts, meshes, exact=exact):
        if exchange.axis == axis:
            num_bytes = num_bytes + exchange.sent_bytes
            calls = calls + np.ceil(exchange.num_bytes / BUCKET_BYTES)
    if axis not in GROUP_AXES:
        return num_bytes, calls
    for exchange in microbatch_exchanges(facts, meshes, exact=exact):
        if exchange.axis == axis:
            num_bytes = num_bytes + meshes.rounds * exchange.sent_bytes
    return num_bytes, calls + meshes.rounds * facts.work.calls(axis)


def _update_bytes(facts: ModelFacts, meshes: Meshes) -> Any:
    """An update reads the gradient, and reads and writes all the state."""
    kept = state_bytes(facts, meshes)
    return 3 * kept["params"] + 2 * kept["optimizer"]
