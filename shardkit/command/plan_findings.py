"""What the planner finds for a config, in numbers.

Owns the questions beside the search itself: how the mesh of the config compares, which
collectives a mesh has, how much of the peak is used, and what would fit where nothing
does. It reads no config and prints nothing.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from shardkit.errors import ConfigError
from shardkit.mesh import consistency_class
from shardkit.planner.candidates import divisors, inner_sizes, outer_meshes
from shardkit.planner.choice import Choice, Plan
from shardkit.planner.cost import predict
from shardkit.planner.elastic_choice import ElasticPlan, choose_next
from shardkit.planner.exchanges import microbatch_exchanges, state_exchanges
from shardkit.planner.meshes import Meshes, Topology
from shardkit.planner.model_facts import ModelFacts
from shardkit.planner.profile import HardwareProfile
from shardkit.planner.quotas import Quotas
from shardkit.planner.search import KEPT_PART, Job, search
from shardkit.report.terminal import format_bytes, format_mesh

__all__ = ["Findings", "find"]

_MOST_DOUBLINGS = 6


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is said of a config.

    Attributes:
        job: What is trained.
        topology: The devices.
        profile: What they can do, with the memory that was asked for.
        plan: The chosen mesh and the others.
        current: The config's mesh on these devices.
        after: What to go on with after a loss; None if it was not asked for.
    """

    job: Job
    topology: Topology
    profile: HardwareProfile
    plan: Plan
    current: Choice
    after: ElasticPlan | None

    @property
    def facts(self) -> ModelFacts:
        """The model, with the microbatches of the job."""
        return next(self.job.blocks())[2]

    @property
    def limit_bytes(self) -> float:
        """What a step may take of a device."""
        return _limit(self.profile)

    def mfu(self, choice: Choice) -> float:
        """What of the peak of the devices in use goes into the model.

        Work that is done again, as with remat, does not count.
        """
        facts = self.facts
        forward, work = facts.forward.total_flops, facts.work.total_flops
        if not work:
            return 0.0
        # A gradient takes twice the work of a loss, or less for the first layer.
        useful = min(3 * forward, work) / work
        peak_s = useful * sum(
            amount / self.profile.peak(dtype)
            for (dtype, _), amount in facts.work.flops.items()
        )
        num = choice.num_devices
        if self.profile.is_shared:
            num = -(-num // self.profile.devices_per_host)
        return peak_s * choice.num_microbatches / (choice.step_s * num)

    def collectives(self, choice: Choice) -> list[dict[str, Any]]:
        """Adds up what a device exchanges in a step, by axis and collective."""
        meshes = Meshes.of(choice.sizes, choice.num_microbatches, choice.rounds)
        found: dict[tuple[str, str], dict[str, Any]] = {}
        exact, rounds = self.job.exact, float(meshes.rounds[0])
        all_of = [(x, 1.0) for x in state_exchanges(self.facts, meshes, exact=exact)]
        each_of = microbatch_exchanges(self.facts, meshes, exact=exact)
        for each, times in [*all_of, *((x, rounds) for x in each_of)]:
            sent = float(np.ravel(each.sent_bytes)[0]) * times
            if not sent:
                continue
            row = found.setdefault(
                (each.axis, each.kind),
                {"axis": each.axis, "collective": each.kind, "of": []}
                | {"buffer_bytes": 0.0, "sent_bytes": 0.0},
            )
            row["of"] += [each.state] * (each.state not in row["of"])
            row["buffer_bytes"] += float(np.ravel(each.num_bytes)[0]) * times
            row["sent_bytes"] += sent
        return list(found.values())

    def consistency(self, old: Mapping[str, int], new: Mapping[str, int]) -> str:
        """The class of a change of mesh: sums of floats keep no bits."""
        if self.job.exact or dict(old) == dict(new):
            return consistency_class(old, new)
        return "equivalent"


def find(
    job: Job,
    topology: Topology,
    profile: HardwareProfile,
    *,
    current: Mapping[str, int],
    num_lost: int = 0,
    remaining_steps: int = 1,
) -> Findings:
    """Plans a job, and what to do after a loss if there is one.

    Args:
        job: What is trained.
        topology: The devices.
        profile: What they can do.
        current: Mesh axis → size, of the config.
        num_lost: How many devices, but not all, are lost then; 0 for no such question.
        remaining_steps: How many steps are left then.

    Raises:
        ConfigError: If no mesh fits, saying what would.
    """
    _check_room(job, topology, profile, "")
    plan = search(job, topology, profile)
    after = None
    if num_lost:
        fewer = dataclasses.replace(
            topology, num_devices=topology.num_devices - num_lost
        )
        _check_room(job, fewer, profile, f"--what-if-lose {num_lost}: ")
        after = choose_next(
            job,
            fewer,
            profile,
            old=plan.best.sizes,
            remaining_steps=remaining_steps,
            num_lost=num_lost,
        )
    now = _predicted(job, topology, profile, current)
    return Findings(job, topology, profile, plan, now, after)


def _limit(profile: HardwareProfile) -> float:
    return profile.memory_bytes * KEPT_PART


def _predicted(
    job: Job, topology: Topology, profile: HardwareProfile, sizes: Mapping[str, int]
) -> Choice:
    """Predicts one mesh."""
    remat, num, facts = next(job.blocks())
    meshes = Meshes.of(sizes, num)
    costs = predict(facts, meshes, profile, topology, exact=job.exact)
    return Choice.at(0, remat, meshes, costs, 0.0)


def _smallest(job: Job, topology: Topology, profile: HardwareProfile) -> Choice:
    """Finds the mesh that takes least memory."""
    remat, num, facts = next(job.blocks())
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
        raise ConfigError(
            f"no mesh of {topology.num_devices} devices has the sizes that are given: "
            f"{job.fixed}. Let --axes name more."
        )
    meshes = Meshes.join(found)
    costs = predict(facts, meshes, profile, topology, exact=job.exact)
    # Of those that take as little the one with the fewest devices.
    order = np.lexsort((meshes.num_devices, costs.memory_bytes))
    return Choice.at(int(order[0]), remat, meshes, costs, 0.0)


def _check_room(
    job: Job, topology: Topology, profile: HardwareProfile, where: str
) -> None:
    limit = _limit(profile)
    least = _smallest(job, topology, profile)
    if least.memory_bytes <= limit:
        return
    kind = max(least.memory, key=lambda name: least.memory[name])
    gigabytes = math.ceil(least.memory_bytes / KEPT_PART / 1e8) / 10
    advice = [f"--hbm {gigabytes:g}GB", *_what_fits(job, topology, profile)]
    if kind == "activations":
        advice.append("perhaps remat, or smaller microbatches, in the model's options")
    num = topology.num_devices
    what = f"mesh of {num} devices fits" if num > 1 else "single device has the room"
    raise ConfigError(
        f"{where}no {what}: "
        f"{format_mesh(least.sizes)} takes least, {format_bytes(least.memory_bytes)} "
        f"a device, most of it {kind} with {format_bytes(least.memory[kind])}; that is "
        f"{format_bytes(least.memory_bytes - limit)} more than {format_bytes(limit)}, "
        f"{KEPT_PART:.0%} of its memory. What would fit: {'; '.join(advice)}."
    )


def _what_fits(job: Job, topology: Topology, profile: HardwareProfile) -> Iterator[str]:
    """Tries what a user could change: each alone, and together if none is enough."""
    limit = _limit(profile)

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
        fits(f"{num} devices", dataclasses.replace(topology, num_devices=num))
        for num in counts
    )
    found.append(next(filter(None, more), ""))
    yield from filter(None, found)
