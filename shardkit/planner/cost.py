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
from collections.abc import Mapping
from typing import Any

import numpy as np

from shardkit.mesh import GROUP_AXES
from shardkit.planner.exchanges import microbatch_exchanges, state_exchanges
from shardkit.planner.memory import BUCKET_BYTES, memory, state_bytes
from shardkit.planner.meshes import Meshes, Topology
from shardkit.planner.model_facts import ModelFacts
from shardkit.planner.profile import ALONE, HardwareProfile

__all__ = ["Costs", "predict"]

# Larger pieces of memory go back to the system when they are free, and are mapped anew:
# glibc's largest threshold for that (mallopt, M_MMAP_THRESHOLD).
_KEPT_BYTES = 32 << 20
_TEMPORARY = ("gathered", "sums", "gradient", "activations", "adding up")
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
    products_s, others_s = _microbatch_s(facts, meshes, profile)
    alone = profile.alone_fraction
    rounds = {part: _rounds(meshes, profile, alone[part]) for part in ALONE}
    kinds = memory(facts, meshes, exact=exact)
    floats = kinds["sums"] / (2 if exact else 1)
    time_s = {
        "compute": rounds["products"] * products_s + rounds["others"] * others_s,
        # One device alone has use for all of the memory.
        "adding gradients": _rounds(meshes, profile, 1.0)
        * floats
        / 4
        * _BYTES_TO_ADD[exact]
        / profile.memory_bytes_s,
        "packing": _packed_bytes(kinds, floats, meshes)
        / profile.memory_bytes_s
        * share,
        "allocating": _fresh_bytes(kinds) * profile.fresh_byte_s * share,
        "update": _update_bytes(facts, meshes) / profile.memory_bytes_s * share,
        "overhead": profile.step_overhead_s * share
        + rounds["others"] * profile.microbatch_overhead_s,
    }
    sent: dict[str, Any] = {}
    for axis, (bandwidth, latency) in links.items():
        sent[axis], hops = _sent(axis, facts, meshes, exact)
        time_s[f"over {axis}"] = (sent[axis] / bandwidth + hops * latency) * share
    away = np.where(meshes.offload, 2 * state_bytes(facts, meshes)["optimizer"], 0.0)
    offload = profile.links["offload"]
    time_s["offload"] = away / offload.bandwidth_bytes_s * share
    return Costs(kinds, time_s, sent)


def _microbatch_s(
    facts: ModelFacts, meshes: Meshes, profile: HardwareProfile
) -> tuple[Any, Any]:
    """Seconds of the gradient of one microbatch: of its products, and between them.

    Products are limited by arithmetic or by memory, and what is between them by memory;
    they take turns. On a shared host this is what it takes of the whole host.
    """
    work = facts.work
    flop_s = np.zeros(len(meshes))
    for (dtype, axes), amount in work.flops.items():
        count = math.prod(meshes.sizes[axis] for axis in axes)
        flop_s += amount / count / profile.flops_s(dtype)
    product_s = work.share(work.product_bytes, meshes.sizes) / profile.memory_bytes_s
    # What is written is read again.
    written = 2 * profile.written_fraction * work.share(work.other_bytes, meshes.sizes)
    overhead_s = work.num_products * profile.product_overhead_s
    return (
        np.maximum(flop_s, product_s),
        overhead_s + written / profile.memory_bytes_s,
    )


def _share(meshes: Meshes, profile: HardwareProfile) -> Any:
    """By how much devices that share a host slow one another down."""
    if not profile.is_shared:
        return 1.0
    return np.minimum(meshes.num_devices, profile.devices_per_host)


def _rounds(meshes: Meshes, profile: HardwareProfile, alone: float) -> Any:
    """How many microbatches it takes as long as, one after the other.

    Those that share a host leave it to the others when they are done, so that it
    computes all of its microbatches, however they are dealt out. A device that is alone
    keeps a part of it busy only, and of what is idle then each further one takes that
    part, as they do not wait at the same time.
    """
    if not profile.is_shared:
        return meshes.rounds
    per_host = profile.devices_per_host
    groups = meshes.sizes["data"] * meshes.sizes["fsdp"]
    groups = np.minimum(groups, np.maximum(per_host // meshes.inner, 1))
    together = np.minimum(meshes.rounds * groups, meshes.num_microbatches)
    busy = 1 - (1 - alone) ** np.minimum(groups * meshes.inner, per_host)
    return together * np.minimum(meshes.inner, per_host) / busy


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
    """Bytes that a device sends over an axis in a step, and how often one waits."""
    num_bytes, hops = np.zeros(len(meshes)), np.zeros(len(meshes))
    for exchange in state_exchanges(facts, meshes, exact=exact):
        if exchange.axis == axis:
            num_bytes = num_bytes + exchange.sent_bytes
            calls = np.ceil(exchange.num_bytes / BUCKET_BYTES)
            hops = hops + calls * _hops(exchange.num_devices)
    if axis not in GROUP_AXES:
        return num_bytes, hops
    for exchange in microbatch_exchanges(facts, meshes, exact=exact):
        if exchange.axis == axis:
            num_bytes = num_bytes + meshes.most * exchange.sent_bytes
    calls = meshes.most * facts.work.calls(axis)
    return num_bytes, hops + calls * _hops(meshes.sizes[axis])


def _hops(num_devices: Any) -> Any:
    """How often data go on until all devices have them, in a tree."""
    return np.ceil(np.log2(num_devices))


def _update_bytes(facts: ModelFacts, meshes: Meshes) -> Any:
    """An update reads the gradient, and reads and writes all the state."""
    kept = state_bytes(facts, meshes)
    return 3 * kept["params"] + 2 * kept["optimizer"]


def _fresh_bytes(kinds: Mapping[str, Any]) -> Any:
    """What a step is given while it runs, if that is more than hosts keep for it."""
    total = sum(kinds[kind] for kind in _TEMPORARY)
    return np.where(total > _KEPT_BYTES, total, 0.0)


def _packed_bytes(kinds: Mapping[str, Any], floats: Any, meshes: Meshes) -> Any:
    """Parameters are unpacked; sums are set to zero, packed, and made floats again."""
    made = (kinds["sums"] + floats) / meshes.sizes["fsdp"]
    return 2 * kinds["gathered"] + 3 * kinds["sums"] + made
