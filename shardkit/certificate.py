"""Whether a change of devices altered bits.

Owns which placements are known to compute the same bits, and what follows if two do
not. Invariants: a difference is never passed over in silence; steps of which the bits
may differ are not compared, and nothing is certified of them but that the state was
moved as it was. Where the run stands then is the controller's business.
"""

from collections.abc import Callable
from typing import Any

import jax

from shardkit.elastic import Transition, differences
from shardkit.errors import LostStateError, RestoreError
from shardkit.events import EventLog
from shardkit.mesh import device_ids
from shardkit.placement import Placement
from shardkit.snapshot.snapshots import Snapshots
from shardkit.state import TrainState

__all__ = ["Certificates", "compare_moved", "compute_both"]


class Certificates:
    """The certificates of a run.

    Args:
        when: `"always"`, `"first"` (two placements for the first time) or `"off"`.
        stop_on_failure: Whether one that fails ends the run.
        events: Where it is told if not.
    """

    def __init__(self, when: str, *, stop_on_failure: bool, events: EventLog) -> None:
        self._when, self._stops, self._events = when, stop_on_failure, events
        # Of each set, all compute the same bits.
        self._trusted: list[set[Any]] = []

    def are_wanted(self, old: Placement, new: Placement) -> bool:
        """Whether a change from one placement to another is to be certified."""
        if self._when == "first":
            return not any({_key(old), _key(new)} <= alike for alike in self._trusted)
        return self._when == "always"

    def judge(
        self,
        transition: Transition,
        differing: list[str],
        step: int,
        *,
        is_past: bool = False,
    ) -> None:
        """Takes what was found.

        Args:
            transition: The change.
            differing: The leaves, and metrics, of which bits differ.
            step: Which step was computed on both sides.
            is_past: Whether the old devices are gone.

        Raises:
            CertificateError: If bits differ, and the run is to stop.
        """
        if not differing:
            alike = {_key(transition.old.at(step)), _key(transition.new.at(step))}
            met = [known for known in self._trusted if known & alike]
            self._trusted = [known for known in self._trusted if known not in met]
            self._trusted.append(alike.union(*met))
            return
        goes_on = not self._stops
        error = transition.failure(differing, step, goes_on=goes_on, is_past=is_past)
        if self._stops:
            raise error
        self._events.emit("notice", message=str(error))

    def repeat_step(
        self,
        transition: Transition,
        snapshots: Snapshots,
        step: int,
        state: TrainState,
        get_batch: Callable[[int], Any],
    ) -> bool | None:
        """Computes a step of devices that are lost once more, where its result now is.

        Args:
            transition: The change after which this is done.
            snapshots: Where the state before that step may be.
            step: Which.
            state: What the lost devices have made of it; it is not used up.
            get_batch: Step → global batch.

        Returns:
            Whether the bits are the same; None if that was not asked for or promised,
            or there is nothing to compute them from.

        Raises:
            CertificateError: If they differ, and the run is to stop.
        """
        if transition.consistency != "exact" or not snapshots.has(step):
            return None
        # It may have been the last one of another phase.
        placement = transition.new.at(step)
        if not self.are_wanted(transition.old.at(step), placement):
            return None
        with transition.phase("compile"):
            placement.compile()
            placement.compile_digests()
        with transition.phase("old_digest"):
            wanted = placement.digest(state)
        with transition.phase("batch"):
            batch = get_batch(step)
        try:
            with transition.phase("restore"):
                _, before = snapshots.load(placement.layout, placement.mesh, step)
        except (RestoreError, LostStateError) as error:
            self._events.emit("notice", message=f"not certified: {error}")
            return None
        with transition.phase("new_step"):
            repeated, _ = jax.block_until_ready(placement.step(before, batch))
        with transition.phase("new_digest"):
            found = placement.digest(repeated)
        differing = differences(found, wanted, {}, {})
        self.judge(transition, differing, step, is_past=True)
        return not differing


def _key(placement: Placement) -> Any:
    # With other sizes, or another grid, the step is another program.
    mesh = placement.mesh
    return device_ids(mesh), mesh.devices.shape, placement.grid.num_microbatches


def compare_moved(
    before: TrainState, after: TrainState, transition: Transition, step: int
) -> None:
    """Compares what was moved with what was there, before either is used up.

    Raises:
        CertificateError: If bits differ.
    """
    with transition.phase("compare"):
        found, wanted = transition.new.digest(after), transition.old.digest(before)
    differing = differences(found, wanted, {}, {})
    if differing:
        raise transition.bad_move(differing, step)
    transition.move_certified = True


def compute_both(
    before: TrainState,
    after: TrainState,
    batch: Any,
    transition: Transition,
    computed: Callable[[TrainState], None],
) -> tuple[TrainState, dict[str, Any], list[str]]:
    """Computes a step on the old and on the new placement of a change.

    Args:
        before: The state on the old one; it is used up.
        after: The same on the new one; likewise.
        batch: The global batch.
        transition: The change.
        computed: Is given the state of the old one as soon as there is one.

    Returns:
        The state and the metrics of the new one, and what differs.
    """
    old, new = transition.old, transition.new
    with transition.phase("old_step"):
        stayed, expected = old.step(before, batch)
        computed(stayed)
        jax.block_until_ready(stayed)
    with transition.phase("old_digest"):
        wanted = old.digest(stayed)
    with transition.phase("new_step"):
        moved, metrics = jax.block_until_ready(new.step(after, batch))
    with transition.phase("new_digest"):
        found = new.digest(moved)
    return moved, metrics, differences(found, wanted, metrics, expected)
