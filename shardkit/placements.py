"""The placements of a run.

Owns which devices of the pool a device count means, in which order they sit, and the
programs that wait for them. Invariant: each order of devices has one placement, derived
once. It holds no state.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from shardkit.errors import MembershipError
from shardkit.events import EventLog
from shardkit.mesh import MeshSpec, device_ids
from shardkit.mesh_order import MeshOrder
from shardkit.placement import Placement
from shardkit.program import in_this_context
from shardkit.program_report import ProgramReport
from shardkit.recipe import Recipe
from shardkit.state_moves import compile_move
from shardkit.waits import Waiter

__all__ = ["Placements", "choose_devices"]


def choose_devices(pool: Sequence[Any], num_devices: int) -> list[Any]:
    """Takes the first devices of every process, as evenly as possible.

    Raises:
        MembershipError: If the pool has too few, or a process would be left out.
    """
    processes: dict[int, list[Any]] = {}
    for device in pool:
        processes.setdefault(device.process_index, []).append(device)
    if not len(processes) <= num_devices <= len(pool):
        raise MembershipError(
            f"expected {len(processes)} (one for each process) to {len(pool)} devices "
            f"(the pool), found {num_devices}"
        )
    taken = dict.fromkeys(processes, 0)
    while sum(taken.values()) < num_devices:
        open_ = [p for p in processes if taken[p] < len(processes[p])]
        taken[min(open_, key=lambda p: taken[p])] += 1
    return [d for p, devices in processes.items() for d in devices[: taken[p]]]


class Placements:
    """The placements of a run, each derived once.

    Args:
        recipe: What is computed.
        layout: A `TrainState` of `LeafLayout`.
        spec: The mesh that is asked for.
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
        present: Where the state is, after which others order their devices and of whose
            grid they are; None while it is nowhere.

    Raises:
        MeshError: If the mesh cannot be built even on the whole pool.
        PartitionError, InexactError: If a loss cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        layout: Any,
        spec: MeshSpec,
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
        spec.sizes(len(pool))
        self.recipe, self.pool = recipe, list(pool)
        self.present: Placement | None = None
        self._layout, self._spec = layout, spec
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

    def on(self, num_devices: int) -> Placement:
        """Returns the placement on `num_devices` devices of the pool.

        An executable serves one order of its devices only, and compiling takes longer
        than moving. So among the orders whose program is ready, or else is being made,
        or else was ready for steps of another phase, it is the one to which least has
        to be moved; where there is none, the best of all orders. Without a present
        placement, and over several processes, which must agree whatever each has
        compiled, it is the order of the pool.
        """
        if num_devices not in self._told:
            self._told.add(num_devices)
            for note in self._spec.decisions(num_devices):
                self._events.emit("notice", message=f"mesh: {note}")
        with self._lock:
            return self._choose(num_devices, self.present)

    def preparing(self, num_devices: int) -> Callable[[], int]:
        """Returns what compiles all that a change to `num_devices` needs from here.

        It may run in any thread, and returns the bytes of code that it added.
        """
        present = self.present

        def prepare() -> int:
            with self._lock:
                placement = self._choose(num_devices, present)
                self._under_way.append(placement)
            try:
                self._prepare_move(present, placement)
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
        plain = self._plain_mesh(new.num_devices)
        if device_ids(plain) == device_ids(new.mesh):
            return None
        return self._mesh_order.num_bytes(old.mesh, plain)

    def _plain_mesh(self, num_devices: int) -> Mesh:
        return self._spec.build(choose_devices(self.pool, num_devices))

    def _choose(self, num_devices: int, present: Placement | None) -> Placement:
        plain = self._plain_mesh(num_devices)
        ids = set(device_ids(plain))
        if present is not None and set(device_ids(present.mesh)) == ids:
            return present
        # Without a state, the step that is next is not known either.
        grid = None if present is None else present.grid
        num = grid.num_microbatches if grid else self.recipe.ramp(0)
        if jax.process_count() > 1:
            return self._derive(plain).with_grid(num)
        alike = [p for p in self._known.values() if set(device_ids(p.mesh)) == ids]
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
        return self._derive(self._spec.build(devices)).with_grid(num)

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
