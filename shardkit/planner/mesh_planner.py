"""The mesh of every device count, as the planner chooses it.

Owns the answers of `mesh="auto"`, and what is told of them. Invariants: without leave
the sizes of `tensor`, `expert` and `context` stay where a state comes from; an answer
follows from what is asked and what was known at the start. It predicts nothing itself.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from shardkit.errors import MeshError
from shardkit.mesh import GROUP_AXES, MESH_AXES, consistency_class
from shardkit.mesh_choice import Chosen
from shardkit.planner.auto_mesh import AutoMesh
from shardkit.planner.choice import Choice, Plan
from shardkit.planner.elastic_choice import choose_next
from shardkit.planner.meshes import Topology
from shardkit.planner.profile import HardwareProfile
from shardkit.planner.room import check_room, predicted
from shardkit.planner.search import KEPT_PART, Job, search
from shardkit.words import format_mesh, format_time

__all__ = ["MeshPlanner"]

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class _Target:
    """Where a change would go.

    Attributes:
        plan: The mesh, and those it was chosen from.
        move_s: What it takes to get there.
        stay: The mesh that is left, if it could be kept.
    """

    plan: Plan
    move_s: float
    stay: Choice | None

    def pays(self, steps_left: int) -> bool:
        """Whether what it saves in so many steps is more than what the move takes."""
        if self.stay is None:
            return True
        return steps_left * (self.stay.step_s - self.plan.best.step_s) > self.move_s


class MeshPlanner:
    """Chooses the meshes of a run; a `MeshChooser`.

    Args:
        job: What is trained.
        profile: What the devices can do.
        auto: What was asked for.
        num_processes: Each of which has to use a device.

    Example:
        >>> import jax, optax
        >>> from shardkit.model import Model
        >>> from shardkit.planner.auto_mesh import find_profile
        >>> from shardkit.planner.jobs import read_job
        >>> from shardkit.ramp import BatchRamp
        >>> model = Model(init=lambda key: jax.numpy.ones(8),
        ...               loss=lambda w, x, key: jax.numpy.sum(w * x["x"]))
        >>> rows = {"x": jax.ShapeDtypeStruct((1, 8), "float32")}
        >>> auto = AutoMesh(profile="cpu")
        >>> job = read_job(model, rows, optax.sgd(0.1), BatchRamp({0: 4}))
        >>> planner = MeshPlanner(job, find_profile(auto, jax.devices()), auto)
        >>> chosen = planner.choose(8)
        >>> math.prod(chosen.sizes.values()) + chosen.plan["num_idle"]
        8
    """

    def __init__(
        self,
        job: Job,
        profile: HardwareProfile,
        auto: AutoMesh,
        *,
        num_processes: int = 1,
    ) -> None:
        self._job, self._profile, self._auto = job, profile, auto
        self._num_processes = num_processes
        self._targets: dict[Any, _Target] = {}

    @property
    def chooses_groups(self) -> bool:
        """Whether sizes of `tensor`, `expert` or `context` are chosen, too."""
        return bool(self._auto.axes)

    def choose(
        self,
        num_devices: int,
        *,
        old: Sizes | None = None,
        horizon: int | None = None,
        steps_left: int | None = None,
    ) -> Chosen:
        """Returns the mesh for a number of devices; see `MeshChooser`."""
        key = num_devices, None if old is None else tuple(old.items()), horizon
        if key not in self._targets:
            self._targets[key] = self._target(num_devices, old, horizon)
        target = self._targets[key]
        stays = steps_left is not None and not target.pays(steps_left)
        best = target.stay if stays and target.stay else target.plan.best
        is_same = old is not None and _whole(old) == dict(best.sizes)
        told = self._told(target.plan, best, num_devices) | {
            "consistency": None if old is None else self._class(old, best.sizes),
            "steps_left": steps_left,
            "move_s": 0.0 if is_same else target.move_s,
        }
        if stays and best.sizes != target.plan.best.sizes:
            note = _why_it_stays(target, best, steps_left or 0)
            told |= {"notes": [note, *_about_idle(best, num_devices)]}
        return Chosen(sizes=dict(best.sizes), plan=told)

    def _class(self, old: Sizes, new: Sizes) -> str:
        return consistency_class(old, new) if self._job.exact else "equivalent"

    def _target(
        self, num_devices: int, old: Sizes | None, horizon: int | None
    ) -> _Target:
        job = dataclasses.replace(self._job, fixed=self._fixed(num_devices, old))
        profile = self._profile
        topology = Topology(num_devices, profile.devices_per_host)
        check_room(job, topology, profile, where="mesh: ")
        least = self._num_processes
        if old is None or not horizon:
            plan = search(job, topology, profile, min_devices=least)
            return _Target(plan, 0.0, None)
        old = _whole(old)
        found = choose_next(
            job,
            topology,
            profile,
            old=old,
            remaining_steps=horizon,
            num_lost=max(math.prod(old.values()) - num_devices, 0),
            min_devices=least,
        )
        is_there = math.prod(old.values()) <= num_devices
        stay = predicted(job, topology, profile, old) if is_there else None
        return _Target(found.plan, found.move_s, stay)

    def _fixed(self, num_devices: int, old: Sizes | None) -> dict[str, int]:
        """The sizes that are not chosen."""
        fixed = self._auto.fixed
        if old is not None and not self._auto.allow_equivalent:
            # What is given stays given, wherever the state was saved.
            fixed = {axis: fixed.get(axis, old.get(axis, 1)) for axis in GROUP_AXES}
        least = math.prod(fixed.values())
        if least > num_devices:
            remedy = "Make these axes smaller, in a run that begins anew"
            if {axis for axis, n in fixed.items() if n > 1} <= {*self._auto.axes}:
                remedy = "With allow_equivalent, another mesh may be taken"
            raise MeshError(
                f"mesh: {format_mesh(fixed)} needs at least {least} devices, found "
                f"{num_devices}. {remedy}, or keep {least} devices or more."
            )
        return fixed

    def _told(self, plan: Plan, best: Choice, num_devices: int) -> dict[str, Any]:
        """What the event `"plan"` has; JSON values alone."""

        def others(pairs: Any) -> list[dict[str, Any]]:
            return [_numbers(choice) | {"why": why} for choice, why in pairs]

        return {
            "num_devices": num_devices,
            "num_idle": num_devices - best.num_devices,
            **_numbers(best),
            "time_s": dict(best.time_s),
            "memory": dict(best.memory),
            "limit_bytes": self._profile.memory_bytes * KEPT_PART,
            "runners_up": others(plan.runners_up),
            "too_large": others(plan.too_large),
            "notes": list(plan.notes),
            "profile": self._profile.name,
            "measured_by": self._profile.measured_by,
        }


def _whole(sizes: Sizes) -> dict[str, int]:
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def _numbers(choice: Choice) -> dict[str, Any]:
    return {
        "mesh": dict(choice.sizes),
        "step_s": choice.step_s,
        "memory_bytes": choice.memory_bytes,
    }


def _about_idle(best: Choice, num_devices: int) -> list[str]:
    idle = num_devices - best.num_devices
    return [f"{idle} of {num_devices} devices stay idle"] if idle else []


def _why_it_stays(target: _Target, stay: Choice, steps_left: int) -> str:
    best = target.plan.best
    saved = format_time(1e3 * (stay.step_s - best.step_s))
    return (
        f"the mesh stays: {format_mesh(best.sizes)} would save {saved} a step, and "
        f"moving takes {format_time(1e3 * target.move_s)}, with {steps_left} steps left"
    )
