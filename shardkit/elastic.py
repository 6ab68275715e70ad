"""What a change of devices consists of.

Owns the placements of a run, which devices of the pool they take, and the parts of a
change from one to another. Invariant: a state that was moved is, to the bit, the state
that was. In which order the parts are done is the controller's business.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from shardkit.errors import (
    CertificateError,
    LostStateError,
    MembershipError,
    MeshError,
)
from shardkit.events import EventLog, Phase
from shardkit.membership import Change, Membership
from shardkit.mesh import BATCH_AXES, MeshSpec, device_ids, mesh_sizes
from shardkit.mesh_order import MeshOrder
from shardkit.placement import Placement
from shardkit.program import in_this_context
from shardkit.program_report import ProgramReport
from shardkit.recipe import Recipe
from shardkit.resharding import move_state
from shardkit.state import TrainState
from shardkit.waits import Waiter

__all__ = ["Placements", "Transition", "ask", "choose_devices", "differences"]


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
        batch: The global batch, abstractly.
        eval_batch: A global batch to evaluate on; the very same object for one alike.
        events: Where compilations and decisions are recorded.
        waiter: What waits for programs.
        certifies: Whether a change may need digests.

    Attributes:
        recipe: What is computed.
        pool: All devices there are.
        present: Where the state is, after which others order their devices; None
            while it is nowhere.

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
        certifies: bool = True,
    ) -> None:
        # A mesh that fits on no devices should fail before anything runs.
        sizes = spec.sizes(len(pool))
        unused = {axis: n for axis, n in sizes.items() if axis not in BATCH_AXES}
        if any(n > 1 for n in unused.values()):
            raise MeshError(
                f"{spec}: a trainer uses {' and '.join(BATCH_AXES)} only, so the other "
                f"axes must be 1, found {unused}"
            )
        self.recipe, self.pool = recipe, list(pool)
        self.present: Placement | None = None
        self._layout, self._spec = layout, spec
        self._batch, self._events, self._waiter = batch, events, waiter
        self._eval_batch = None if eval_batch is batch else eval_batch
        params = jax.tree.map(lambda leaf: leaf.abstract, layout.params)
        self._outputs = recipe.output_structure(params, batch, eval_batch)
        self._certifies = certifies
        self._known: dict[Any, Placement] = {}
        self._under_way: list[Placement] = []
        self._mesh_order = MeshOrder(layout)
        self._told: set[int] = set()
        self._lock = threading.Lock()

    def on(self, num_devices: int) -> Placement:
        """Returns the placement on `num_devices` devices of the pool.

        An executable serves one order of its devices only, and compiling takes longer
        than moving. So among the orders whose program is ready, or else is being made,
        it is the one to which least has to be moved; where there is none, the best of
        all orders. Without a present placement, and over several processes, which must
        agree whatever each has compiled, it is the order of the pool.
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
                return placement.prepare(
                    digests=self._certifies, eval_batch=self._eval_batch
                )
            finally:
                with self._lock:
                    self._under_way.remove(placement)

        return in_this_context(prepare)

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
        if jax.process_count() > 1:
            return self._derive(plain)
        ids = set(device_ids(plain))
        known = [p for p in self._known.values() if set(device_ids(p.mesh)) == ids]
        ready = [p for p in known if p.is_compiled]
        ready = ready or [p for p in known if p in self._under_way]
        if present is None:
            # Nothing is moved: any that is ready will do, and first the plain one.
            ready.sort(key=lambda p: device_ids(p.mesh) != device_ids(plain))
            return ready[0] if ready else self._derive(plain)
        if present in ready:
            return present
        if ready:
            source = present.mesh
            return min(ready, key=lambda p: self._mesh_order.num_bytes(source, p.mesh))
        devices = self._mesh_order.devices(present.mesh, plain)
        return self._derive(self._spec.build(devices))

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
            )
        return self._known[key]

    def compiles(self) -> dict[str, int]:
        """How often each program was compiled, over all placements."""
        totals: dict[str, int] = {}
        for placement in list(self._known.values()):
            for name, program in list(placement.programs.items()):
                totals[name] = totals.get(name, 0) + program.counts["compile"]
        return totals


def ask(
    membership: Membership,
    step: int,
    num_devices: int,
    pool: Sequence[Any],
    events: EventLog,
) -> Change:
    """Asks for a change; one that cannot be made is told, and the run goes on."""
    try:
        change = membership.poll(step, num_devices) or Change()
        if change.num_devices is not None:
            choose_devices(pool, change.num_devices)
        return change
    except MembershipError as error:
        events.emit("notice", message=f"no change of devices: {error}")
        return Change()


def differences(
    found: Mapping[str, np.ndarray],
    wanted: Mapping[str, np.ndarray],
    metrics: Mapping[str, Any],
    expected: Mapping[str, Any],
) -> list[str]:
    """Names the leaves whose digests differ, and the metrics whose bits do."""
    differing = [
        path for path, lanes in found.items() if not np.array_equal(lanes, wanted[path])
    ]
    return differing + [
        f"metrics/{name}"
        for name, value in metrics.items()
        if np.asarray(value).tobytes() != np.asarray(expected[name]).tobytes()
    ]


class Transition:
    """One change of placement, timed phase by phase.

    Args:
        old: Where the state is.
        new: Where it goes.
        start_s: When it began, before `new` was derived, in seconds of
            `time.monotonic`.
        plain_bytes: What moving takes in the plain order of the new devices; None if
            that is the order they have.

    Attributes:
        start_s: The same.
        phases: What was done, in order.
        was_ready: Whether the program was compiled when the change came.
    """

    def __init__(
        self,
        old: Placement,
        new: Placement,
        start_s: float,
        *,
        plain_bytes: int | None = None,
    ) -> None:
        self.old, self.new, self.start_s = old, new, start_s
        self.phases: list[Phase] = []
        self._record("derive", start_s, time.monotonic())
        self.bytes_moved = self.plain_bytes_moved = 0
        self._plain_bytes = plain_bytes
        self.was_ready = new.is_compiled

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a block, also one that fails: it took its time."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            self._record(name, start_s, time.monotonic())

    def _record(
        self, name: str, start_s: float, end_s: float, num_bytes: int = 0
    ) -> None:
        begin_s = self.start_s
        self.phases.append(Phase(name, start_s - begin_s, end_s - begin_s, num_bytes))

    def move(
        self,
        state: TrainState,
        *,
        lost: frozenset[int] = frozenset(),
        keep_source: bool = False,
    ) -> TrainState:
        """Moves the state, and waits until it is there.

        Raises:
            LostStateError: If a part of it survives nowhere.
        """
        start_s = time.monotonic()
        try:
            moved = move_state(
                state,
                self.old.layout,
                self.old.mesh,
                self.new.mesh,
                lost=lost,
                keep_source=keep_source,
            )
        except LostStateError:
            # Found out while planning; nothing was moved.
            self._record("plan", start_s, time.monotonic())
            raise
        # A phase that ended when its copies were asked for would say nothing.
        jax.block_until_ready(moved.tree)
        planned_s = start_s + moved.plan_s
        self._record("plan", start_s, planned_s)
        self._record("move", planned_s, time.monotonic(), moved.bytes_moved)
        self.bytes_moved = self.plain_bytes_moved = moved.bytes_moved
        if self._plain_bytes is not None:
            self.plain_bytes_moved = self._plain_bytes
        return moved.tree

    def report(self, step: int, certified: bool | None) -> dict[str, Any]:
        """Describes the change, as the event `reconfigure` has it."""
        return {
            "step": step,
            "from_devices": self.old.num_devices,
            "to_devices": self.new.num_devices,
            "from_mesh": mesh_sizes(self.old.mesh),
            "to_mesh": mesh_sizes(self.new.mesh),
            "bytes_moved": self.bytes_moved,
            "plain_bytes_moved": self.plain_bytes_moved,
            "phases": [phase.record() for phase in self.phases],
            "was_ready": self.was_ready,
            "certified": certified,
        }

    def failure(self, differing: list[str], step: int) -> CertificateError:
        """Describes a failed certificate."""
        return CertificateError(
            f"step {step}: {mesh_sizes(self.old.mesh)} and {mesh_sizes(self.new.mesh)} "
            f"computed other bits in {len(differing)} leaves: "
            f"{', '.join(differing[:8])}{', …' if len(differing) > 8 else ''}. "
            "The trainer stands after that step on the old devices: save it and report "
            "this, or go on with "
            "on_failed_certificate='continue'."
        )
