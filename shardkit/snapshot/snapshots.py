"""Snapshots of a run: taken beside its steps, and gone back to.

Owns the thread that copies states, and the order of things: at most one snapshot is on
its way, and the next one waits for it. Invariant: a state is not used up before it is
copied on its devices, which is all that a step waits for; a snapshot that fails costs
the run nothing but that snapshot, which is told. When to take one, and what to do with
it, is the controller's business.

Memory: on each device `Staging.num_bytes` while a snapshot is on its way; in host
memory the images of two steps and, where devices have memory of their own, what is
pinned for the bytes of one. `Snapshots.predict` tells how much that is.
"""

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from shardkit.errors import (
    ConfigError,
    DamagedError,
    LostStateError,
    SaveError,
    TornError,
)
from shardkit.events import EventLog
from shardkit.mesh import mesh_sizes
from shardkit.metrics import StepMetrics
from shardkit.snapshot.config import SnapshotConfig
from shardkit.snapshot.image import ImageWriter
from shardkit.snapshot.kept import image_layout
from shardkit.snapshot.layout import META_ROOM_BYTES, ImageLayout
from shardkit.snapshot.pace import Pace
from shardkit.snapshot.recent import RecentSteps
from shardkit.snapshot.restore import restore
from shardkit.snapshot.store import HostMemory, Store
from shardkit.snapshot.writing import count_writers, write_pieces
from shardkit.staging import Coming, Staging

__all__ = ["Snapshots", "open_snapshots"]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What this process keeps of the states on one mesh."""

    staging: Staging
    image: ImageLayout

    @property
    def kept(self) -> list[tuple[int, int]]:
        return [(piece.leaf, piece.device) for piece in self.image.pieces]


@dataclasses.dataclass
class _Job:
    """One snapshot on its way.

    Attributes:
        step: The step that the state stands before.
        staging: How it is copied.
        copy: The program that does.
        state: Until it is copied.
        meta: Makes what its image says of the steps before it.
        is_staged: Set when it is, or cannot be.
        computed_s: When the state was seen to be computed; only where that is waited
            for.
        held_s: When the next step began to wait for the copy.
        stall_s: How long it did, from when it had nothing else to wait for.
    """

    step: int
    staging: Staging
    copy: Any
    state: Any
    meta: Callable[[], dict[str, Any]]
    is_staged: threading.Event = dataclasses.field(default_factory=threading.Event)
    computed_s: float = math.inf
    held_s: float = math.inf
    stall_s: float = 0.0

    def stage(self, kept: Sequence[tuple[int, int]]) -> tuple[list[Array], Coming]:
        """Copies the state on its devices; a step that waits may then go on.

        Returns:
            The copies, and the pieces of them that are on their way to host memory.
        """
        try:
            self.wait_for_state()
            staged = self.copy(self.state)
            return staged, self.staging.start(staged, kept)
        finally:
            self.state = None
            self.note_stall()
            self.is_staged.set()

    def wait_for_state(self) -> None:
        """Waits until the state is computed, where that has to be waited for.

        Where host memory is that of the devices, nothing is queued behind the
        collectives of a step: the next one would wait for them too, with or without
        a snapshot.
        """
        state = self.state
        if state is not None and self.staging.is_on_host:
            jax.block_until_ready(state)
            self.computed_s = min(self.computed_s, time.monotonic())

    def note_stall(self) -> None:
        """Notes that the next step has been held up until now, if it has."""
        waits = self.staging.is_on_host
        since_s = max(self.held_s, self.computed_s) if waits else self.held_s
        self.stall_s = max(time.monotonic() - since_s, 0.0)


class Snapshots:
    """The snapshots of a run.

    Args:
        every: Steps between two of them; 0 for none.
        store: Where they are kept.
        events: Where each is told, as `"snapshot"`.
    """

    def __init__(self, every: int, store: Store, events: EventLog) -> None:
        self.every = every
        self._store, self._events = store, events
        self._thread = ThreadPoolExecutor(1, initializer=_name_thread)
        self._jobs: list[tuple[_Job, Future[None]]] = []
        self._plans: dict[Staging, _Plan] = {}
        self._recent = RecentSteps(META_ROOM_BYTES)
        self._kept: int | None = None
        self._pace = Pace(every)

    def is_due(self, step: int) -> bool:
        """Whether the state before a step is to be taken."""
        return self.every > 0 and step % self.every == 0

    def note(self, step: int, mesh: Mesh, values: Mapping[str, Array]) -> None:
        """Notes a step that was dispatched, for the images of the states after it.

        Args:
            step: Which.
            mesh: Where it runs.
            values: What is measured, still on its devices.
        """
        if self.every:
            metrics = StepMetrics(
                step=step,
                num_devices=mesh.size,
                mesh=mesh_sizes(mesh),
                values=values,
                step_s=None,
            )
            self._recent.add(metrics)

    def take(self, step: int, staging: Staging, copy: Any, state: Any) -> None:
        """Starts a snapshot of a state; `hold` must come before that is used up.

        Args:
            step: The step that the state stands before.
            staging: How it is copied.
            copy: The program that does, compiled: state → copies.
            state: Where it is; it may still be computed.
        """
        job = _Job(step, staging, copy, state, self._recent.before(step))
        self._jobs.append((job, self._thread.submit(self._keep, job)))

    def hold(self) -> None:
        """Waits until the state that was taken last may be used up."""
        if not self._jobs:
            return
        job = self._jobs[-1][0]
        if not job.is_staged.is_set():
            job.held_s = time.monotonic()
            # If the state cannot be had, that is told by whoever uses it.
            with contextlib.suppress(RuntimeError):
                job.wait_for_state()
            job.is_staged.wait()
            # To wake up takes a moment more, which is usually told in time.
            job.note_stall()
        # One thread: those before it have come to their end.
        self._finish(len(self._jobs) - 1)

    def _keep(self, job: _Job) -> None:
        """Brings a state to the store; runs in the thread."""
        since_s = time.monotonic()
        try:
            plan = self._plan(job.staging)
        except BaseException:
            job.is_staged.set()
            raise
        staged, coming = job.stage(plan.kept)
        try:
            jax.block_until_ready(staged)
            start_s = time.monotonic()
            slot = self._store.reserve(plan.image.num_bytes)
            self._write(slot.memory, job, plan, coming)
        finally:
            for array in staged:
                array.delete()
        self._store.commit(slot, job.step)
        self._kept = job.step
        now_s = time.monotonic()
        copy_s = now_s - start_s
        self._events.emit(
            "snapshot",
            since_s=since_s,
            step=job.step,
            bytes=plan.image.num_bytes,
            stall_s=job.stall_s,
            copy_s=copy_s,
        )
        if message := self._pace.note(now_s, stall_s=job.stall_s, copy_s=copy_s):
            self._events.emit("notice", message=message)

    def _write(
        self, memory: memoryview, job: _Job, plan: _Plan, coming: Coming
    ) -> None:
        step, generation = job.step, self._store.generation
        writer = ImageWriter(memory, plan.image, step=step, generation=generation)
        self._events.begin("snapshot", step=step)
        num_threads = count_writers(is_on_host=plan.staging.is_on_host)
        write_pieces(writer, plan.staging.read(coming), num_threads)
        writer.commit(job.meta())

    def _plan(self, staging: Staging) -> _Plan:
        if staging not in self._plans:
            self._plans[staging] = _Plan(staging, image_layout(staging, self._store))
        return self._plans[staging]

    def ensure(self, step: int, staging: Staging, copy: Any, state: Any) -> None:
        """Sees that a state is in a snapshot, whether one is due or not.

        Args:
            step: As in `take`, like all that follow.
            staging: How it is copied.
            copy: What does.
            state: Where it is.

        Raises:
            SaveError: If it could not be taken.
        """
        self.wait()
        if self._kept != step:
            self.take(step, staging, copy, state)
            self.wait()
        if self._kept != step:
            raise SaveError(f"the state before step {step} is in no snapshot")

    def wait(self) -> None:
        """Waits for the snapshots that are on their way; what failed is told."""
        self._finish(len(self._jobs))

    def _finish(self, num_jobs: int) -> None:
        for _ in range(num_jobs):
            job, future = self._jobs.pop(0)
            try:
                future.result()
            except Exception as error:
                self._fail(job.step, error)

    def _fail(self, step: int, error: Exception) -> None:
        known = self._store.steps()
        newest = f", the newest is of step {known[-1]}" if known else ""
        why = f"{type(error).__name__}: {error}".removesuffix(": ")
        message = f"no snapshot of step {step}{newest}: {why}"
        self._events.emit("notice", message=message)

    @property
    def newest_step(self) -> int | None:
        """The newest step that can be gone back to."""
        return next(reversed(self._store.steps()), None)

    @property
    def mesh(self) -> dict[str, int] | None:
        """Mesh axis → size, where the newest was taken; None if that cannot be read."""
        step = self.newest_step
        try:
            images = [] if step is None else self._store.images(step)
        except (TornError, DamagedError, LostStateError):
            return None
        meshes = [image.layout.mesh for image in images]
        found = (zip(mesh.axes, mesh.shape, strict=True) for mesh in meshes[:1])
        return next(map(dict, found), None)

    def has(self, step: int) -> bool:
        """Whether there is a snapshot of a step."""
        return step in self._store.steps()

    def load(self, layout: Any, mesh: Mesh, step: int | None = None) -> tuple[int, Any]:
        """Makes a state of a snapshot, the newest that is whole by default.

        Args:
            layout: A tree of `LeafLayout`.
            mesh: Where the state goes.
            step: Of which step.

        Returns:
            The step, and the state.

        Raises:
            LostStateError: If there is none.
            TornError, DamagedError: If the one of a certain step is not whole; or the
                newest, over several processes, which must agree on another.
        """
        here = self._store.host(jax.process_index())
        is_certain = step is not None or jax.process_count() > 1
        for tried in [step] if step is not None else self._store.steps()[::-1]:
            try:
                images = self._store.images(tried)
                state = restore(images, layout, mesh, host=here)
                self._recent.learn(images[0].meta)
                return tried, state
            except (TornError, DamagedError, LostStateError) as error:
                if is_certain:
                    raise
                self._store.forget(tried)
                message = f"the snapshot of step {tried} is passed over: {error}"
                self._events.emit("notice", message=message)
        raise LostStateError(
            "expected a snapshot to go on from, found none that is whole. Go on from a "
            "checkpoint."
        )

    def go_on(self, layout: Any, mesh: Mesh) -> tuple[int, Any]:
        """Makes the state that earlier processes left, and tells what they did last.

        Args:
            layout: As in `load`, like what is returned and raised.
            mesh: Where the state goes.
        """
        with self._events.phase("restore", step=self.newest_step):
            step, state = self.load(layout, mesh)
        self._events.emit("last_steps", step=step, **self._recent.before(step)())
        return step, state

    def forget(self) -> None:
        """Drops all snapshots, since the run goes on from elsewhere."""
        self.wait()
        self._recent.clear()
        self._store.forget()

    def close(self) -> None:
        """Waits for what is on its way, and ends the thread."""
        self.wait()
        self._thread.shutdown()

    def predict(self, staging: Staging) -> dict[str, int]:
        """What snapshots of states on a mesh take, before any is taken.

        Returns:
            `"device_bytes"`: more on every device, while one is on its way.
            `"image_bytes"`: in host memory for each of two steps.
            `"pinned_bytes"`: of host memory that devices write to, likewise.
        """
        image = self._plan(staging).image
        return {
            "device_bytes": staging.num_bytes,
            "image_bytes": image.num_bytes,
            "pinned_bytes": 0 if staging.is_on_host else image.num_bytes,
        }


def _name_thread() -> None:
    # By its name a trace tells what works in the background.
    threading.current_thread().name = "shardkit-snapshot"


def open_snapshots(config: SnapshotConfig | None, events: EventLog) -> Snapshots:
    """Opens the snapshots of a run, of which there may never be any.

    Raises:
        ConfigError: If several processes are to keep theirs in their own memory.
    """
    if config is None:
        return Snapshots(0, HostMemory(), events)
    if config.store is None and jax.process_count() > 1:
        raise ConfigError(
            "Trainer: snapshots of several processes need a store that outlives each "
            "of them; start the run by `shardkit launch`, or give snapshot=None"
        )
    return Snapshots(config.every, config.store or HostMemory(), events)
