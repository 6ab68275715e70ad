"""Where a run stands, and how it gets on from there.

Owns the live state with its step: stepping, moving to other devices, saving, going
back. Invariant: the state, the data cursor and the step are one; whatever happens, the
run stands where the state stands. When to do which of these is the trainer's business.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from jax import Array

from shardkit.certificate import Certificates, compare_moved, compute_both
from shardkit.checkpoint.history import History
from shardkit.checkpoint.remap import Remap
from shardkit.digest import combine_digests
from shardkit.elastic import Transition
from shardkit.errors import ConfigError, LostStateError, RestoreError
from shardkit.events import EventLog
from shardkit.foresight import Foresight
from shardkit.headcount import Headcount
from shardkit.membership import Change
from shardkit.placement import Placement
from shardkit.placements import Placements
from shardkit.prefetch import Prefetcher
from shardkit.rescue import newest_snapshot
from shardkit.snapshot.snapshots import Snapshots
from shardkit.standby import Standby
from shardkit.state import TrainState
from shardkit.state_moves import is_whole
from shardkit.waits import Waiter

__all__ = ["Controller"]


class Controller:
    """Holds the state of a run, wherever it is.

    Args:
        placements: Where it can be.
        data: `step → global batch`.
        checkpoints: Where it is saved, or None.
        manifest: JSON facts that a checkpoint must share to be restored.
        certify: `"always"`, `"first"` or `"off"`.
        stop_on_failure: Whether a failed certificate ends the run.
        events: Where events are sent.
        waiter: What waits for programs and batches.
        snapshots: Where it is copied to beside the steps.
        standby: What makes programs ready before they are needed, or None.

    Attributes:
        step: How many steps are done; the index of the next one.
        live: The placement and the state on it; None before the first use.
        is_resumed: Whether what was due at its first step may not have been done.
        headcount: How many devices it has.
        foresight: What is made ready for changes to come.
    """

    def __init__(
        self,
        *,
        placements: Placements,
        data: Callable[[int], Any],
        history: History | None,
        certify: str,
        stop_on_failure: bool,
        events: EventLog,
        waiter: Waiter,
        snapshots: Snapshots,
        standby: Standby | None = None,
    ) -> None:
        self.placements, self.events, self.waiter = placements, events, waiter
        self.step, self.is_resumed = 0, False
        self.live: tuple[Placement, TrainState] | None = None
        self.headcount = Headcount(placements, events)
        self._prefetcher = Prefetcher(data)
        self._history, self.metrics = history, dict[str, float]()
        self._certificates = Certificates(
            certify, stop_on_failure=stop_on_failure, events=events
        )
        self.foresight = Foresight(placements, standby, events)
        self._snapshots = snapshots
        self._is_restored = self._is_closed = self._is_lost = False

    @property
    def num_devices(self) -> int:
        """How many devices the run has, or would begin with; some may be idle."""
        return self.headcount.num_devices if self.live else len(self.placements.pool)

    @property
    def num_asked(self) -> int:
        """On how many it will be when the change that was announced is made."""
        return self.foresight.num_asked or self.num_devices

    @property
    def can_save(self) -> bool:
        """Whether there is where to."""
        return self._history is not None

    @property
    def saved_steps(self) -> list[int]:
        """The steps that can be gone back to, oldest first."""
        return self._history.steps() if self._history is not None else []

    def start(self, num_devices: int | None = None) -> tuple[Placement, TrainState]:
        """Puts the state on devices if it is not on any: fresh, or restored."""
        if self.live is None:
            if self._is_lost:
                raise LostStateError(
                    f"the state of step {self.step} was lost in a move that failed; "
                    "go on from a checkpoint, by Trainer.restore()"
                )
            if not self._is_restored and not self.is_resumed:
                self._check_unused()
            there = num_devices or self.num_devices
            self._begin(self.headcount.begin(there, self.step, self._saved_on()))
            self._take_snapshot()
        assert self.live is not None
        self._enter_phase(*self.live)
        self.headcount.stand(self.live[0], self.step)
        return self.live

    def _saved_on(self) -> Mapping[str, int] | None:
        """The mesh of what the run goes on from, where that enters the next one."""
        if not (self.placements.chooses_groups and self.step):
            return None
        return self._saved().mesh if self._is_restored else self._snapshots.mesh

    def moves_to(self, num_devices: int) -> bool:
        """Whether a change to so many devices moves the state; else it is made."""
        if self.live is None:
            return False
        self.foresight.moves()
        return self.headcount.moves(self.start()[0], self.step, num_devices)

    def _enter_phase(self, placement: Placement, state: TrainState) -> None:
        """Goes on with the step's number of microbatches, where the state is."""
        current = placement.at(self.step)
        if current is placement:
            return
        self.live = current, state
        self.foresight.enters_phase()

    def _begin(self, placement: Placement) -> None:
        if self._is_restored:
            self.step, state = self._saved().load(placement)
        elif self.is_resumed:
            goal = placement.layout, placement.mesh
            self.step, state = self._snapshots.go_on(*goal)
            if self._history is not None:
                self._history.go_on(self.step)
        else:
            state = placement.init()
        self.live = placement, state

    def _take_snapshot(self, metrics: dict[str, Array] | None = None) -> None:
        """Starts a copy of the state if one is due, before a step uses it up."""
        placement, state = self.start()
        if metrics is not None:
            self._snapshots.note(self.step - 1, placement.mesh, metrics)
        if self._snapshots.is_due(self.step):
            placement.compile_stage()
            self._snapshots.take(self.step, placement.staging, placement.stage, state)

    def next_change(self, change: Change) -> Change:
        """Returns the change to make now; one with notice waits for its program.

        Args:
            change: What has just been asked for, if anything.
        """
        present = self.start()[0] if self.live is not None else None
        return self.foresight.next_change(change, self.step, present, self.num_devices)

    def advance(self) -> dict[str, Array]:
        """Runs one step where the state is, and returns its metrics."""
        placement, state = self.start()
        is_first = not placement.is_compiled
        if is_first:
            placement.compile()
        batch = self._batch(self.step)
        self.events.begin("step", step=self.step)
        state, metrics = placement.step(state, batch, self._snapshots.hold)
        # State and step move together, before anybody sees either.
        self.live, self.step = (placement, state), self.step + 1
        self.foresight.stepped()
        self._take_snapshot(metrics)
        self.foresight.look_ahead(self.start()[0], self.step)
        if is_first and placement.not_donated:
            names = ", ".join(placement.not_donated)
            message = f"not donated, so that they exist twice during a step: {names}"
            self.events.emit("notice", message=message)
        return metrics

    def reconfigure(self, num_devices: int, change: Change) -> dict[str, Array] | None:
        """Moves to another placement; returns the metrics of a step if it did one."""
        start_s = time.monotonic()
        self._snapshots.hold()
        old, before = self.start()
        new = self.placements.on(num_devices)
        plain_bytes = self.placements.plain_bytes(old, new)
        transition = Transition(
            old, new, start_s, plain_bytes=plain_bytes, num_devices=num_devices
        )
        transition.announce(self.events, self.step)
        if change.lost:
            # First of all, since what is on lost devices cannot even be saved.
            self._move_what_is_left(before, transition)
            # Maybe an earlier step, and of another phase.
            placement, state = self.start()
            self._compile(placement, transition)
            certified = self._certificates.repeat_step(
                transition, self._snapshots, self.step - 1, state, self._batch
            )
            self._tell(transition, self.step, certified)
            return None
        if self._certificates.are_wanted(old, new):
            with transition.phase("compile"):
                # Between the two steps nothing can be given up: both states are gone.
                for placement in (old, new):
                    placement.compile()
                    placement.compile_digests()
            # Nothing is used up yet, and the batch may be on its way meanwhile.
            after = transition.move(before, keep_source=True)
            compare_moved(before, after, transition, self.step)
            if transition.consistency == "exact":
                with transition.phase("batch"):
                    batch = self._batch(self.step)
                with self.waiter.ignoring():
                    return self._certify(before, after, batch, transition)
            # Two steps would differ, by rounding, whether or not anything is wrong.
            self._arrive(transition, after)
        else:
            self._compile(new, transition)
            self._move(before, transition)
        self._tell(transition, self.step, None)
        return None

    def _arrive(self, transition: Transition, state: TrainState) -> None:
        self.live = transition.new, state
        self.headcount.num_devices = transition.num_devices

    def _compile(self, placement: Placement, transition: Transition) -> None:
        with transition.phase("compile"):
            placement.compile()

    def _move(self, before: TrainState, transition: Transition, **options: Any) -> None:
        """Moves the state, of which nothing stays behind."""
        try:
            self._arrive(transition, transition.move(before, **options))
        except LostStateError:
            # Told before anything was moved.
            raise
        except BaseException:
            # Shards are freed as they are sent; from then on there is no way back.
            if not is_whole(before):
                self.live, self._is_lost = None, True
            raise

    def _certify(
        self, before: TrainState, after: TrainState, batch: Any, transition: Transition
    ) -> dict[str, Array]:
        """Computes a step on both placements, and goes on with the new one."""
        step = self.step

        def computed(stayed: TrainState) -> None:
            # Whatever happens to the other, this state is whole.
            self.live, self.step = (transition.old, stayed), step + 1

        moved, metrics, differing = compute_both(
            before, after, batch, transition, computed
        )
        self._certificates.judge(transition, differing, step)
        self._arrive(transition, moved)
        self._take_snapshot(metrics)
        self._tell(transition, step, not differing)
        return metrics

    def _tell(self, transition: Transition, step: int, certified: bool | None) -> None:
        report = transition.report(step, certified)
        self.events.emit("reconfigure", since_s=transition.start_s, **report)

    def _move_what_is_left(self, before: TrainState, transition: Transition) -> None:
        """Moves the surviving shards, or goes back to the newest step that is whole."""
        lost = self.placements.lost(transition.old, transition.num_devices)
        try:
            self._move(before, transition, lost=lost)
            return
        except LostStateError as error:
            at = self.step
            with transition.phase("restore"):
                source = self._go_back(transition.new, error)
            self.headcount.num_devices = transition.num_devices
        num = at - self.step
        self.events.emit("rewind", step=self.step, repeats=num, source=source)
        found = f"step {self.step} restored from a {source}, {num} to repeat"
        self.events.emit("notice", message=f"lost shards: {found}")

    def _go_back(self, placement: Placement, error: LostStateError) -> str:
        """Goes to the newest step that is in host memory or on a disk."""
        # Nothing is live until it is read, so that nothing half-read can be saved.
        before, self.live = self.live, None
        found = newest_snapshot(self._snapshots, placement, self.saved_steps)
        if found is not None:
            self.step, self.metrics = found[0], {}
            self.live = placement, found[1]
            return "snapshot"
        if not self.saved_steps:
            self.live = before
            raise error
        self.restore(None)
        self._begin(placement)
        return "checkpoint"

    def digest(self) -> str:
        """Digests the logical state; the same on every mesh."""
        placement, state = self.start()
        return combine_digests(placement.digest(state), placement.layout)

    def save(self, *, wait: bool) -> None:
        """Saves the state, unless this run has saved this very step already.

        Args:
            wait: Whether to return only when it is committed.

        Raises:
            ConfigError: If there is nowhere to.
            RestoreError: If another run has saved there meanwhile.
        """
        start_s = time.monotonic()
        history, (placement, state) = self._saved(), self.start()
        state = placement.on_devices(state)
        self.events.begin("checkpoint", step=self.step)
        history.save(self.step, state, placement, metrics=self.metrics, wait=wait)
        self.events.emit("checkpoint", since_s=start_s, step=self.step)

    def wait_for_saves(self) -> None:
        """Waits until what is being saved is committed."""
        if self._history is not None:
            self._history.wait()

    def go_on(self) -> int:
        """Goes to the newest snapshot, if there is one; read when first needed."""
        newest = self._snapshots.newest_step
        if newest is not None:
            self.step, self.is_resumed = newest, True
        return self.step

    def restore(
        self, step: int | None, remap: Remap | None = None, source: Any = None
    ) -> int:
        """Goes to a saved step; the state is read when it is first needed."""
        # What is live is given up first: two states may not fit.
        self.step = self._saved().choose(step, remap, source)
        self.live, self._is_restored, self._is_lost = None, True, False
        self.metrics = {}
        self._snapshots.forget()
        return self.step

    def keep(self) -> None:
        """Sees that the state is in a snapshot; raises `SaveError` if it cannot be."""
        placement, state = self.start()
        self._snapshots.ensure(self.step, placement.staging, placement.stage, state)

    def wait_for_standby(self, timeout_s: float) -> bool:
        """Waits until nothing is made ready; whether that was so in time."""
        return self.foresight.wait(timeout_s)

    def close(self) -> None:
        """Ends background work; a second call does nothing."""
        self._prefetcher.close()
        self.foresight.close()
        self._snapshots.close()
        if self._history is not None:
            self._history.close()
            self._history = None
            self._is_closed = True

    def _batch(self, step: int) -> Any:
        return self._prefetcher.get(step, check=self.waiter.check)

    def _check_unused(self) -> None:
        """Refuses to begin anew among checkpoints, which would soon be overwritten."""
        steps = self.saved_steps
        if steps:
            raise RestoreError(
                f"{self._saved().directory}: holds steps {steps} of a run. Call "
                "Trainer.restore() to go on from there, or give a new run another "
                "directory."
            )

    def _saved(self) -> History:
        if self._history is None:
            if self._is_closed:
                raise ConfigError("Trainer: closed; it neither saves nor restores")
            raise ConfigError(
                "Trainer: made without checkpoint=CheckpointConfig(...), so it can "
                "neither save nor restore"
            )
        return self._history
