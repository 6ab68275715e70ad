"""What a change of devices consists of.

Owns the question whether one is asked for, and the parts of a change from one placement
to another. Invariant: a state that was moved is, to the bit, the state
that was. In which order the parts are done is the controller's business.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from shardkit.errors import (
    CertificateError,
    ConfigError,
    LostStateError,
    MembershipError,
    MeshError,
)
from shardkit.events import EventLog, Phase
from shardkit.membership import Change, Membership
from shardkit.mesh import consistency_class, mesh_sizes
from shardkit.placement import Placement
from shardkit.placements import Placements
from shardkit.state import TrainState
from shardkit.state_moves import move_state

__all__ = ["Transition", "ask", "differences"]


def ask(
    membership: Membership,
    step: int,
    num_devices: int,
    placements: Placements,
    events: EventLog,
) -> Change:
    """Asks for a change; one that cannot be made is told, and the run goes on.

    Raises:
        MeshError: If it cannot go on, as there is no mesh for the devices that are left
            when others are lost.
    """
    try:
        change = membership.poll(step, num_devices) or Change()
        if change.num_devices is not None:
            _check(change, step, placements)
        return change
    except MembershipError as error:
        events.emit("notice", message=f"no change of devices: {error}")
        return Change()


def _check(change: Change, step: int, placements: Placements) -> None:
    assert change.num_devices is not None
    try:
        placements.check(change.num_devices)
    except (MeshError, ConfigError) as error:
        if not change.lost:
            raise MembershipError(str(error)) from error
        raise MeshError(
            f"step {step}: devices are lost, and there is no mesh for the "
            f"{change.num_devices} that are left: {error} Or go on from a checkpoint "
            "when there are enough devices again."
        ) from error


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
        num_devices: How many devices there are then, if some are idle.

    Attributes:
        start_s, num_devices: The same.
        consistency: `"exact"` if the run keeps its bits, else `"equivalent"`.
        move_certified: Whether the state that was moved was compared with what it was.
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
        num_devices: int | None = None,
    ) -> None:
        self.old, self.new, self.start_s = old, new, start_s
        self.num_devices = num_devices or new.num_devices
        same = consistency_class(old.mesh.shape, new.mesh.shape)
        self.consistency = same if old.recipe.exact else "equivalent"
        self.move_certified = False
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
        if lost and self.old.recipe.offload:
            raise LostStateError(
                f"devices {sorted(lost)} are lost, and what was away in their host "
                "memory of the optimizer's state. Go on from a snapshot or checkpoint."
            )
        try:
            moved = move_state(
                self.old.on_devices(state),
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

    def announce(self, events: EventLog, step: int) -> None:
        """Tells that it begins."""
        events.begin("reconfigure", step=step)
        events.emit("reconfiguring", **self._known(step))

    def _known(self, step: int) -> dict[str, Any]:
        """What is known before anything is done."""
        return {
            "step": step,
            "from_devices": self.old.num_devices,
            "to_devices": self.new.num_devices,
            "from_mesh": mesh_sizes(self.old.mesh),
            "to_mesh": mesh_sizes(self.new.mesh),
            "consistency": self.consistency,
        }

    def report(self, step: int, certified: bool | None) -> dict[str, Any]:
        """Describes the change, as the event `reconfigure` has it."""
        return {
            **self._known(step),
            "bytes_moved": self.bytes_moved,
            "plain_bytes_moved": self.plain_bytes_moved,
            "phases": [phase.record() for phase in self.phases],
            "was_ready": self.was_ready,
            "certified": certified,
            "move_certified": self.move_certified,
        }

    def bad_move(self, differing: list[str], step: int) -> CertificateError:
        """Describes a move that altered bits."""
        return CertificateError(
            f"step {step}: the move from {mesh_sizes(self.old.mesh)} to "
            f"{mesh_sizes(self.new.mesh)} altered {len(differing)} leaves: "
            f"{', '.join(differing[:8])}{', …' if len(differing) > 8 else ''}. The "
            "trainer stands before that step on the old devices, with the state as it "
            "was: save it and report this."
        )

    def failure(
        self,
        differing: list[str],
        step: int,
        *,
        goes_on: bool = False,
        is_past: bool = False,
    ) -> CertificateError:
        """Describes a failed certificate.

        Args:
            differing: The leaves that do.
            step: Which step was computed twice.
            goes_on: Whether the run goes on in spite of it.
            is_past: Whether the old devices are gone, and the state is what they left.
        """
        side = "new devices, with what the old ones left" if is_past else "old devices"
        where = (
            "The trainer goes on with the new devices, since that is what "
            "on_failed_certificate='continue' asks for."
            if goes_on
            else f"The trainer stands after that step on the {side}: save it and "
            "report this, or go on with on_failed_certificate='continue'."
        )
        return CertificateError(
            f"step {step}: {mesh_sizes(self.old.mesh)} and {mesh_sizes(self.new.mesh)} "
            f"computed other bits in {len(differing)} leaves: "
            f"{', '.join(differing[:8])}{', …' if len(differing) > 8 else ''}. {where}"
        )
