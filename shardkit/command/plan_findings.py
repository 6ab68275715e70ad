"""What the planner finds for a config, in numbers.

Owns the questions beside the search itself: how the mesh of the config compares, which
collectives a mesh has, and how much of the peak is used. It reads no config and prints
nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from shardkit.mesh import GROUP_AXES, consistency_class
from shardkit.planner.choice import Choice, Plan
from shardkit.planner.elastic_choice import ElasticPlan, choose_next
from shardkit.planner.exchanges import microbatch_exchanges, state_exchanges
from shardkit.planner.meshes import Meshes, Topology
from shardkit.planner.model_facts import ModelFacts
from shardkit.planner.profile import HardwareProfile
from shardkit.planner.room import check_room, predicted
from shardkit.planner.search import KEPT_PART, Job, search

__all__ = ["Findings", "find"]


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is said of a config.

    Attributes:
        job: What is trained.
        topology: The devices.
        profile: What they can do, with the memory that was asked for.
        plan: The chosen mesh and the others.
        current: The config's mesh on these devices, which may be the chosen one.
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
        return self.profile.memory_bytes * KEPT_PART

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
    current: Mapping[str, int] | None,
    num_lost: int = 0,
    keeps_groups: bool = True,
    remaining_steps: int = 1,
) -> Findings:
    """Plans a job, and what to do after a loss if there is one.

    Args:
        job: What is trained.
        topology: The devices.
        profile: What they can do.
        current: Mesh axis → size, of the config; None if it has the mesh chosen.
        num_lost: How many devices, but not all, are lost then; 0 for no such question.
        keeps_groups: Whether those then compute microbatches as before.
        remaining_steps: How many steps are left then.

    Raises:
        ConfigError: If no mesh fits, saying what would.
    """
    check_room(job, topology, profile, more_memory="--hbm {}")
    plan = search(job, topology, profile)
    after = None
    if num_lost:
        fewer = dataclasses.replace(
            topology, num_devices=topology.num_devices - num_lost
        )
        rest = job
        if keeps_groups:
            kept = {axis: plan.best.sizes[axis] for axis in GROUP_AXES}
            rest = dataclasses.replace(job, fixed=kept)
        where = f"--what-if-lose {num_lost}: "
        check_room(rest, fewer, profile, where=where, more_memory="--hbm {}")
        after = choose_next(
            rest,
            fewer,
            profile,
            old=plan.best.sizes,
            remaining_steps=remaining_steps,
            # Idle devices are the first to go, as they are for a trainer.
            num_lost=max(plan.best.num_devices - fewer.num_devices, 0),
        )
    now = plan.best
    if current is not None:
        now = predicted(job, topology, profile, current)
    return Findings(job, topology, profile, plan, now, after)
