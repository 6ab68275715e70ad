"""The placements of a run.

Owns which devices of the pool a device count means, in which order they sit, and the
programs that wait for them. Invariant: each mesh over an order of devices has one
placement, derived once; and all that ask for a device count from the same place are
given the same mesh. It holds no state.
"""

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from shardkit.errors import ConfigError, MembershipError, MeshError
from shardkit.events import EventLog
from shardkit.layout import LeafLayout
from shardkit.mesh import MeshSpec, device_ids, group_size
from shardkit.mesh_choice import Chosen, MeshChooser
from shardkit.mesh_order import MeshOrder
from shardkit.placement import Placement
from shardkit.program import in_this_context
from shardkit.program_report import ProgramReport
from shardkit.recipe import Recipe
from shardkit.state_moves import compile_move
from shardkit.waits import Waiter

__all__ = ["Placements", "choose_devices"]


def choose_devices(
    pool: Sequence[Any], num_devices: int, group_size: int = 1
) -> list[Any]:
    """Takes the first devices of every process, as evenly as possible.

    Groups stay within a process wherever each has as many devices as a group: sums over
    processes are taken in another order, and a group is to keep its bits.

    Args:
        pool: All devices there are, those of a process side by side.
        num_devices: How many to take.
        group_size: How many compute a microbatch together.

    Raises:
        MembershipError: If the pool has too few, or a process would be left out.
    """
    processes: dict[int, list[Any]] = {}
    for device in pool:
        processes.setdefault(device.process_index, []).append(device)
    unit = group_size if all(len(d) >= group_size for d in processes.values()) else 1
    if not len(processes) * unit <= num_devices <= len(pool):
        each = "one" if unit == 1 else f"a group of {unit}"
        raise MembershipError(
            f"expected {len(processes) * unit} ({each} for each process) to "
            f"{len(pool)} devices (the pool), found {num_devices}"
        )
    taken = dict.fromkeys(processes, 0)

    def take(unit: int, limit: int) -> None:
        while sum(taken.values()) + unit <= limit:
            room = [p for p in processes if taken[p] + unit <= len(processes[p])]
            if not room:
                return
            taken[min(room, key=lambda p: taken[p])] += unit

    take(unit, num_devices)
    take(1, num_devices)  # What is no whole group, and stays idle.
    return [d for p, devices in processes.items() for d in devices[: taken[p]]]


@dataclasses.dataclass(frozen=True)
class _Stand:
    """Where a run is, when its next mesh is chosen.

    Attributes:
        placement: Where its state is; None while it is nowhere.
        num_devices: How many devices it has, idle ones among them.
        mesh: Mesh axis → size, of that placement, or of where the state was saved.
        horizon: How many steps were left when it came there; None if it has no end.
        steps_left: How many are left now.
    """

    placement: Placement | None = None
    num_devices: int | None = None
    mesh: Mapping[str, int] | None = None
    horizon: int | None = None
    steps_left: int | None = None


class Placements:
    """The placements of a run, each derived once.

    Args:
        recipe: What is computed.
        layout: A `TrainState` of `LeafLayout`.
        meshes: Which mesh a device count means.
        pool: All devices there are.
        batch: The global batch of step 0, abstractly.
        eval_batch: A global batch to evaluate on; the very same object for one alike.
        events: Where compilations and decisions are recorded.
        waiter: What waits for programs.
        certifies: `"always"`, `"first"` or `"off"`: whether changes need digests.
        speeds: Device id → how fast it is beside the others; 1.0 if not named.
        stages: Whether states are to be copied, for snapshots.

    Attributes:
        recipe: What is computed.
        pool: All devices there are.
        chooses_groups: Whether sizes of the axes within a microbatch are chosen.

    Raises:
        MeshError, ConfigError: If there is no mesh even for the whole pool.
        PartitionError, InexactError: If a loss cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        layout: Any,
        meshes: MeshChooser,
        pool: Sequence[Any],
        batch: Any,
        eval_batch: Any,
        events: EventLog,
        waiter: Waiter,
        *,
        certifies: str = "always",
        speeds: Mapping[int, float] | None = None,
        stages: bool = False,
    ) -> None:
        # A mesh that fits on no devices should fail before anything runs.
        meshes.choose(len(pool))
        self.recipe, self.pool = recipe, list(pool)
        self.chooses_groups = meshes.chooses_groups
        self._layout, self._meshes, self._stand = layout, meshes, _Stand()
        self._batch, self._events, self._waiter = batch, events, waiter
        self._eval_batch = None if eval_batch is batch else eval_batch
        params, model_state = jax.tree.map(
            lambda leaf: leaf.abstract, (layout.params, layout.model_state)
        )
        self._outputs = recipe.output_structure(params, model_state, batch, eval_batch)
        self._certifies, self._stages = certifies, stages
        self._speeds = speeds or {}
        self._known: dict[Any, Placement] = {}
        self._under_way: list[Placement] = []
        self._mesh_order = MeshOrder(layout)
        self._told: set[int] = set()
        self._lock = threading.Lock()

    @property
    def present(self) -> Placement | None:
        """Where the state is, after which others order their devices."""
        return self._stand.placement

    @property
    def num_devices(self) -> int | None:
        """How many devices the run has there, idle ones among them."""
        return self._stand.num_devices

    def stand(
        self, placement: Placement, num_devices: int, steps_left: int | None = None
    ) -> None:
        """Notes where the state is, from which others are chosen and ordered.

        Args:
            placement: Where, and of whose grid others are.
            num_devices: How many devices there are, idle ones among them.
            steps_left: How many steps are still to be done, if that is known.
        """
        before, horizon = self._stand, steps_left
        has_moved = before.placement is None or before.placement.mesh != placement.mesh
        known = before.horizon
        # What was prepared is what a change takes, however late it comes.
        if not has_moved and known is not None and steps_left is not None:
            horizon = max(known, steps_left)
        mesh = dict(placement.mesh.shape)
        self._stand = _Stand(placement, num_devices, mesh, horizon, steps_left)

    def leave(self, saved_on: Mapping[str, int] | None = None) -> None:
        """Notes that the state is on no devices.

        Args:
            saved_on: Mesh axis → size, of the mesh that it was saved on, if it was.
        """
        self._stand = _Stand(mesh=saved_on)

    def devices(self, num_devices: int) -> list[Any]:
        """Returns the devices of the pool that a device count means."""
        sizes = self._chosen(num_devices, self._stand).sizes
        return choose_devices(self.pool, num_devices, group_size(sizes))

    def lost(self, old: Placement, num_devices: int) -> frozenset[int]:
        """Returns the ids of the devices of a placement that are not among so many."""
        left = {device.id for device in self.devices(num_devices)}
        return frozenset(device_ids(old.mesh)) - left

    def check(self, num_devices: int) -> None:
        """Refuses a device count that there is no mesh for.

        Raises:
            MembershipError: If the pool has no so many devices.
            MeshError, ConfigError: If no mesh can be laid over them.
        """
        choose_devices(self.pool, num_devices)
        self.devices(num_devices)

    def plan(self, num_devices: int) -> Mapping[str, Any] | None:
        """Why a device count means its mesh, as the event `"plan"` has it.

        None if that was given.
        """
        return self._chosen(num_devices, self._stand).plan

    def on(self, num_devices: int) -> Placement:
        """Returns the placement on `num_devices` devices of the pool.

        It is the present one if a move would not pay any more.

        An executable serves one order of its devices only, and compiling takes longer
        than moving. So among the orders whose program is ready, or else is being made,
        or else was ready for steps of another phase, it is the one to which least has
        to be moved; where there is none, the best of all orders. Without a present
        placement, and over several processes, which must agree whatever each has
        compiled, it is the order of the pool.
        """
        stand = self._stand
        if num_devices not in self._told:
            self._told.add(num_devices)
            chosen = self._chosen(num_devices, stand)
            for note in (*chosen.notes, *self._about_tensor(chosen.sizes)):
                self._events.emit("notice", message=note)
        with self._lock:
            return self._choose(num_devices, stand)

    def _about_tensor(self, sizes: Mapping[str, int]) -> list[str]:
        """Says if an axis that is for parameters cuts none."""
        leaves: list[LeafLayout] = jax.tree.leaves(self._layout)
        is_used = any(axis == "tensor" for leaf in leaves for axis, _ in leaf.group)
        if sizes["tensor"] == 1 or is_used:
            return []
        return [
            f"mesh: tensor is {sizes['tensor']}, and no rule cuts a parameter by it: "
            "devices of a group compute the same; shardkit suggest finds rules"
        ]

    def preparing(self, num_devices: int) -> Callable[[], int]:
        """Returns what compiles all that a change to `num_devices` needs from here.

        It may run in any thread, and returns the bytes of code that it added: none if
        there is no such change.
        """
        stand = dataclasses.replace(self._stand, steps_left=None)

        def prepare() -> int:
            try:
                with self._lock:
                    placement = self._choose(num_devices, stand)
                    self._under_way.append(placement)
            except (MeshError, ConfigError):
                return 0
            try:
                self._prepare_move(stand.placement, placement)
                return placement.prepare(
                    digests=self._certifies != "off", eval_batch=self._eval_batch
                )
            finally:
                with self._lock:
                    self._under_way.remove(placement)

        return in_this_context(prepare)

    def _prepare_move(self, present: Placement | None, placement: Placement) -> None:
        if present is None or present is placement or jax.process_count() > 1:
            return
        # Under a certificate both states are needed, and the first time only with it.
        kept = {"always": [True], "first": [True, False], "off": [False]}
        for keep_source in kept[self._certifies]:
            compile_move(
                self._layout, present.mesh, placement.mesh, keep_source=keep_source
            )

    def inspect(self, num_devices: int) -> dict[str, ProgramReport]:
        """Reports the programs on `num_devices` devices; compiles if need be."""
        return self.on(num_devices).inspect(eval_batch=self._eval_batch)

    def plain_bytes(self, old: Placement, new: Placement) -> int | None:
        """What a change would move if `new` had the pool's order; None if it has."""
        plain = self._plain_mesh(new.mesh.shape)
        if device_ids(plain) == device_ids(new.mesh):
            return None
        return self._mesh_order.num_bytes(old.mesh, plain)

    def _chosen(self, num_devices: int, stand: _Stand) -> Chosen:
        return self._meshes.choose(
            num_devices,
            old=stand.mesh,
            horizon=stand.horizon,
            steps_left=stand.steps_left,
        )

    def _plain_mesh(self, sizes: Mapping[str, int]) -> Mesh:
        num, group = math.prod(sizes.values()), group_size(sizes)
        devices = choose_devices(self.pool, num, group)
        return MeshSpec(**sizes).build(devices)

    def _choose(self, num_devices: int, stand: _Stand) -> Placement:
        present = stand.placement
        if present is not None and num_devices == stand.num_devices:
            return present
        plain = self._plain_mesh(self._chosen(num_devices, stand).sizes)
        if present is not None and _is_alike(present.mesh, plain):
            return present
        # Without a state, the step that is next is not known either.
        grid = None if present is None else present.grid
        num = grid.num_microbatches if grid else self.recipe.ramp(0)
        if jax.process_count() > 1:
            return self._derive(plain).with_grid(num)
        alike = [p for p in self._known.values() if _is_alike(p.mesh, plain)]
        known = [p.with_grid(num) for p in alike]
        ready = [p for p in known if p.is_compiled]
        ready = ready or [p for p in known if p in self._under_way]
        ready = ready or [p for p in known if p.is_compiled_for_any_step]
        if present is None:
            # Nothing is moved: any that is ready will do, and first the plain one.
            ready.sort(key=lambda p: device_ids(p.mesh) != device_ids(plain))
            return ready[0] if ready else self._derive(plain).with_grid(num)
        if ready:
            source = present.mesh
            return min(ready, key=lambda p: self._mesh_order.num_bytes(source, p.mesh))
        devices = self._mesh_order.devices(present.mesh, plain)
        return self._derive(MeshSpec(**plain.shape).build(devices)).with_grid(num)

    def _derive(self, mesh: Mesh) -> Placement:
        key = (device_ids(mesh), tuple(mesh.shape.items()))
        if key not in self._known:
            self._known[key] = Placement(
                self.recipe,
                self._layout,
                mesh,
                self._batch,
                self._outputs,
                self._events,
                self._waiter,
                speeds=self._speeds,
                stages=self._stages,
            )
        return self._known[key]

    def compiles(self) -> dict[str, int]:
        """How often each program was compiled, over all placements."""
        totals: dict[str, int] = {}
        for placement in list(self._known.values()):
            for name, count in placement.count_compiles():
                totals[name] = totals.get(name, 0) + count
        return totals


def _is_alike(mesh: Mesh, other: Mesh) -> bool:
    """Whether they are as large along every axis, over the same devices."""
    same_sizes = mesh.devices.shape == other.devices.shape
    return same_sizes and {*device_ids(mesh)} == {*device_ids(other)}
