"""What the planner finds for a config, in numbers.

Owns the questions beside the search itself: how the mesh of the config compares, which
collectives a mesh has, and how much of the peak is used. It reads no config and prints
nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from shardkit.errors import ConfigError
from shardkit.mesh import GROUP_AXES, consistency_class
from shardkit.planner.choice import Choice, Plan, why_not
from shardkit.planner.elastic_choice import ElasticPlan, choose_next
from shardkit.planner.exchanges import microbatch_exchanges, state_exchanges
from shardkit.planner.meshes import Meshes, Topology
from shardkit.planner.model_facts import ModelFacts
from shardkit.planner.profile import HardwareProfile
from shardkit.planner.room import check_room, predicted, variants
from shardkit.planner.search import KEPT_PART, Job, search
from shardkit.words import format_mesh, format_microbatches

__all__ = ["Findings", "find"]


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is said of a config.

    Attributes:
        job: What is trained.
        topology: The devices.
        profile: What they can do, with the memory that was asked for.
        plan: The chosen mesh and the others.
        current: The config's mesh on these devices, which may be the chosen one, and
            all else as in the config.
        otherwise: The chosen mesh with all else that may be chosen: those that fit,
            the fastest first, and the others; empty if the mesh alone is chosen.
        after: What to go on with after a loss; None if it was not asked for.
    """

    job: Job
    topology: Topology
    profile: HardwareProfile
    plan: Plan
    current: Choice
    otherwise: tuple[Choice, ...]
    after: ElasticPlan | None

    @property
    def facts(self) -> ModelFacts:
        """The model, as the config has it."""
        return next(self.job.blocks())[2]

    def facts_of(self, choice: Choice) -> ModelFacts:
        """The model, with the microbatches of a choice."""
        return self.job.model(choice.remat, choice.num_microbatches)

    @property
    def limit_bytes(self) -> float:
        """What a step may take of a device."""
        return self.profile.memory_bytes * KEPT_PART

    def mfu(self, choice: Choice) -> float:
        """What of the peak of the devices in use goes into the model.

        Work that is done again, as with remat, does not count.
        """
        facts = self.facts_of(choice)
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
        meshes = Meshes.of(choice.sizes, choice.num_microbatches)
        found: dict[tuple[str, str], dict[str, Any]] = {}
        exact, facts = self.job.exact, self.facts_of(choice)
        all_of = [(x, 1.0) for x in state_exchanges(facts, meshes, exact=exact)]
        each_of = microbatch_exchanges(facts, meshes, exact=exact)
        for each, times in [*all_of, *((x, choice.most) for x in each_of)]:
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

    def spell(self, choice: Choice) -> str:
        """The mesh, and what else was chosen."""
        words = [format_mesh(choice.sizes), self.spell_beside(choice)]
        return " ".join(filter(None, words))

    def spell_beside(self, choice: Choice) -> str:
        """What was chosen beside the mesh, of that which could be."""
        job, words = self.job, []
        if len(job.facts) > 1:
            words.append(choice.remat)
        if job.chooses_offload and choice.offload:
            words.append("offload")
        if len(job.num_microbatches) != 1:
            words.append(format_microbatches(choice.num_microbatches))
        return " ".join(words)

    def why_not(self, choice: Choice) -> str:
        """Why it is not the one that was chosen."""
        return why_not(self.plan.best, choice, self.topology, self.limit_bytes)

    def consistency(self, old: Choice, new: Choice) -> str:
        """The class of a change: sums of floats keep no bits, nor do other programs.

        `"another run"` has other microbatches, and so other random numbers.
        """
        if old.num_microbatches != new.num_microbatches:
            return "another run"
        is_same = dict(old.sizes) == dict(new.sizes)
        if old.remat != new.remat or not (self.job.exact or is_same):
            return "equivalent"
        return consistency_class(old.sizes, new.sizes)


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
        num_left = topology.num_devices - num_lost
        # Nobody knows which: it may be the fastest.
        speeds = tuple(sorted(topology.speeds)[:num_left])
        fewer = dataclasses.replace(topology, num_devices=num_left, speeds=speeds)
        rest = job.chosen(plan.best)
        if keeps_groups:
            kept = {axis: plan.best.sizes[axis] for axis in GROUP_AXES}
            rest = dataclasses.replace(rest, fixed=kept)
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
    elif job.has_choices:
        now = _alone(job, topology, profile, plan)
    otherwise = []
    if job.has_choices:
        otherwise = [*variants(job, topology, profile, plan.best.sizes)]
        limit = profile.memory_bytes * KEPT_PART
        otherwise.sort(key=lambda x: (x.memory_bytes > limit, x.step_s, x.memory_bytes))
    return Findings(job, topology, profile, plan, now, tuple(otherwise), after)


def _alone(
    job: Job, topology: Topology, profile: HardwareProfile, plan: Plan
) -> Choice:
    """What would be chosen of meshes alone; if none fits, the one that was."""
    own = predicted(job, topology, profile, plan.best.sizes)
    try:
        return search(job.chosen(own), topology, profile, num_runners_up=0).best
    except ConfigError:
        return own
