"""What is made ready for the changes to come, beside the steps.

Owns when what is prepared: the program of a change that was announced, those of likely
changes, and that of the next phase of a batch ramp. Invariants: nobody waits for any of
it but a change that was announced; it moves nothing and holds no state. How a program
is made, and in which thread, is not its business.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from shardkit.events import EventLog
from shardkit.membership import Change
from shardkit.overlap import Overlap
from shardkit.placement import Placement
from shardkit.placements import Placements
from shardkit.standby import Standby

__all__ = ["Foresight"]

# Steps on a placement before the next ones are thought of, so that the first steps
# have the machine to themselves.
_SETTLED = 2


class Foresight:
    """Thinks of the changes to come.

    Args:
        placements: Where a run can be.
        standby: What makes programs ready for likely changes, or None.
        events: Where changes that wait for their program are announced.

    Attributes:
        scripted: Device counts that are known to come.
    """

    def __init__(
        self, placements: Placements, standby: Standby | None, events: EventLog
    ) -> None:
        self.scripted: Sequence[int] = []
        self._placements, self._standby = placements, standby
        self._overlap = Overlap(self._preparing, events)
        self._present: Placement | None = None
        self._num_here = 0
        self._is_outdated = False

    @property
    def num_asked(self) -> int | None:
        """The device count of the change that was announced, and is not yet made."""
        return self._overlap.num_asked

    def next_change(
        self, change: Change, step: int, present: Placement | None, num_devices: int
    ) -> Change:
        """Returns the change to make now; one with notice waits for its program.

        Args:
            change: What has just been asked for, if anything.
            step: The next step.
            present: Where the state is, if it is on devices.
            num_devices: How many these are, or would be.
        """
        self._present = present
        # Several processes would be ready at different steps; and where nothing has run
        # yet, one program is compiled and not two.
        is_single = jax.process_count() == 1
        can_wait = is_single and present is not None and present.is_compiled
        if self._is_outdated and can_wait:
            # What was begun is the program of a step of another phase.
            self._overlap.begin_anew()
        self._is_outdated = False
        now = {"step": step, "num_devices": num_devices}
        return self._overlap.next(change, can_wait=can_wait, **now)

    def _preparing(self, num_devices: int) -> Callable[[], Any] | None:
        assert self._present is not None
        if self._placements.on(num_devices).is_compiled:
            return None
        if self._standby is not None:
            # What is asked for comes first, and if it is taken back, guesses again.
            self._standby.expect([])
            self._num_here = 0
        # A certificate digests on both placements.
        counts = num_devices, self._placements.num_devices
        needed = [self._placements.preparing(n) for n in counts if n is not None]
        return lambda: [prepare() for prepare in needed]

    def moves(self) -> None:
        """Notes that the run goes on elsewhere."""
        self._num_here = 0

    def enters_phase(self) -> None:
        """Notes that the run goes on with another number of microbatches."""
        self._num_here = 0
        # Only with the next step is it known where that will be.
        self._is_outdated = True
        if self._standby is not None:
            self._standby.begin_anew()

    def stepped(self) -> None:
        """Notes that a step was begun."""
        if self.num_asked is None:
            self._num_here += 1

    def look_ahead(self, placement: Placement, step: int) -> None:
        """Thinks of what may come next, once the run has settled.

        Args:
            placement: Where the run is.
            step: The next step.
        """
        if self._standby is None or self._num_here != _SETTLED:
            return
        start = placement.recipe.ramp.next_start(step)
        num_devices = self._placements.num_devices or placement.num_devices
        self._standby.look_ahead(
            [device.process_index for device in self._placements.devices(num_devices)],
            len(self._placements.pool),
            scripted=self.scripted,
            certain=None if start is None else placement.preparing_at(start),
        )

    def wait(self, timeout_s: float) -> bool:
        """Waits until nothing is made ready; whether that was so in time."""
        return self._standby is None or self._standby.wait(timeout_s)

    def close(self) -> None:
        """Begins nothing any more; a second call does nothing."""
        self._overlap.close()
        if self._standby is not None:
            self._standby.close()
